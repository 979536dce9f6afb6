//! Runs tests that mount: each in a process of its own, in each world there is.
