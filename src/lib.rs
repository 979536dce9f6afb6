//! sockless builds OCI images from Dockerfiles with no docker.sock, no daemon and no root.

pub mod config;
pub mod confined;
pub mod dockerfile;
pub mod image;
pub mod io;
pub mod pipeline;
pub mod progress;
pub mod registry;
pub mod rootfs;
pub mod sandbox;
pub mod secret;
pub mod service;
pub mod store;
