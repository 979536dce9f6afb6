//! Instructions + base image configs → a graph of steps. No I/O.
//!
//! Planning has two passes because a base image's `ENV`, `SHELL` and `ONBUILD`
//! change what later lines mean: [`graph::graph`] needs only the text and says which
//! images are needed, the network happens in between, and [`lower::lower`] is pure again.

pub mod graph;
pub mod lower;
mod state;
mod support;
#[cfg(test)]
mod tests;
mod text;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::image::{History, ImageConfig};

pub use graph::{ImageNeed, StageGraph, graph};
pub use lower::lower;

/// What the user gave beside the Dockerfile.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `--build-arg`.
    pub build_args: BTreeMap<String, String>,
    /// `--target`.
    pub target: Option<String>,
    /// `--platform`: what the image is for.
    pub platform: crate::image::Platform,
    /// What this machine is.
    pub build_platform: crate::image::Platform,
}

/// Names a step: its place in [`Plan::steps`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StepId(pub usize);

/// Names an image that the plan needs: its place in [`StageGraph::images`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageId(pub usize);

/// A directed acyclic graph of the steps that produce filesystems.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The steps; each comes after those that it needs.
    pub steps: Vec<Step>,
    /// The step whose filesystem is the image's; absent for a `scratch` without layers.
    pub result: Option<StepId>,
    /// The image's config, with the base's history but without the new entries.
    pub config: ImageConfig,
    /// The new history entries. Those that are not `empty_layer` belong, in order, to
    /// the layers above the base's.
    pub history: Vec<History>,
    /// What is surely not meant but stops nothing: `file:line:column: …`.
    pub warnings: Vec<String>,
}

/// One node of the plan: something that produces a filesystem.
#[derive(Clone, Debug)]
pub struct Step {
    /// The filesystem that it starts from; absent: an empty one.
    pub parent: Option<StepId>,
    /// What people see, such as `[build 2/5] RUN make`.
    pub name: String,
    /// `file:line:column` of its instruction.
    pub place: String,
    /// What it does.
    pub operation: Operation,
}

/// What a step does.
#[derive(Clone, Debug)]
pub enum Operation {
    /// The layers of a base image; adds no layer of its own.
    Image(ImageId),
    /// Runs a process; what it changes is a layer.
    Run(Run),
    /// Copies files; they are a layer.
    Copy(Copy),
    /// Makes a directory where there is none, with its parents; that is a layer.
    MakeDirectory(MakeDirectory),
}

/// `RUN`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// The program and its arguments.
    pub args: Vec<String>,
    /// The environment, `NAME=VALUE`.
    pub env: Vec<String>,
    /// Proxy settings that reach the process but neither cache key nor image.
    #[serde(skip)]
    pub proxy_env: Vec<String>,
    /// The working directory, absolute.
    pub cwd: String,
    /// `USER` as written; empty is root.
    pub user: String,
    /// `--network`.
    pub network: Network,
}

/// `RUN --network`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Network {
    /// Outbound connections.
    Default,
    /// Nothing.
    None,
}

/// `COPY` or `ADD`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copy {
    /// Where the sources are.
    pub from: CopyFrom,
    /// What to do, as far as it goes into the cache key.
    pub definition: CopyDefinition,
    /// The filesystem that is read, where it is a step's.
    pub source_step: Option<StepId>,
}

/// Where `COPY` takes files from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyFrom {
    /// The build context.
    Context,
    /// The filesystem of [`Copy::source_step`]; empty where that is absent (`scratch`).
    Step,
}

/// The part of `COPY` that is its definition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyDefinition {
    /// Paths, possibly with wildcards, relative to the source's root.
    pub sources: Vec<String>,
    /// Files whose content stands in the Dockerfile: name and content.
    pub inline: Vec<(String, String)>,
    /// Absolute; a trailing slash says that it is a directory.
    pub destination: String,
    /// `--chown`, expanded.
    pub chown: Option<String>,
    /// `--chmod`, as a mode.
    pub chmod: Option<u32>,
    /// Whether archives are unpacked: `ADD`.
    pub unpack: bool,
    /// Whether owners of the source are kept: copying from a step or an image.
    pub keep_owner: bool,
}

/// `WORKDIR`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MakeDirectory {
    /// Absolute.
    pub path: String,
    /// The owner, as `USER` gives it; empty is root.
    pub user: String,
}
