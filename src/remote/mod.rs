//! Files and trees of other servers that are not registries: what `ADD` and build contexts
//! name by URL.

mod fetcher;
pub mod git;
pub mod http;

pub use fetcher::Fetcher;
