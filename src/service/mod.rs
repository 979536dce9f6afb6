//! `sockless serve`.

pub mod jobs;
pub mod log;
