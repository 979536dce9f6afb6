//! sockless builds OCI images from Dockerfiles with no docker.sock, no daemon and no root.

pub mod cli;
pub mod confined;
pub mod context;
pub mod dockerfile;
pub mod export;
pub mod failure;
pub mod image;
pub mod io;
pub mod layer;
pub mod pipeline;
pub mod plan;
pub mod progress;
pub mod registry;
pub mod rootfs;
pub mod sandbox;
pub mod secret;
pub mod store;
