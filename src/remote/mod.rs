//! Files and trees of other servers that are not registries: what `ADD` and build contexts
//! name by URL.

pub mod git;
pub mod http;
