//! Re-derives every digest, size and diff ID from the bytes it is given.
