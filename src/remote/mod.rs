//! Files and trees of other servers, for `ADD` and for build contexts.

pub mod http;
