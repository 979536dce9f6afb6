//! sockless builds OCI images from Dockerfiles with no docker.sock, no daemon and no root.
//!
//! # The flow
//!
//! ```text
//! CONTEXT ─ context::open ─▶ BuildContext, Dockerfile text    a directory, standard input; URL and git by remote
//! Dockerfile text ─ dockerfile::parse ─▶ Dockerfile           typed instructions, with spans; no I/O
//! Dockerfile ─ plan::graph ─▶ StageGraph                      which images the target needs; no I/O
//! image references ─ registry, layout ─▶ Resolved             manifests and configs; no layer yet
//!                  └─ graph again, until it asks for no image that is missing: ONBUILD may name more
//! Dockerfile + configs ─ lint::walk ─▶ warnings               and the answers of --check and --call
//! StageGraph + configs + build args ─ plan::lower ─▶ Plan     a graph of steps with their inputs; no I/O
//! the Plan of each platform ─ plan::join ─▶ Joined            one graph, in which equal steps are one
//! Joined ─ build::build ─▶ Built                              cache look-up, or rootfs + sandbox, or copy
//! Built + config ─ image::assemble ─▶ Image                   manifest and config: values and raw bytes
//! the Image of each platform ─ image::assemble_index ─▶ index names them all
//! Image or index ─ registry, export ─▶ a registry, an archive, a layout, a directory
//! webhook ─ service ─▶ job ─▶ source ─▶ the same flow, in a child process
//! ```
//!
//! Each arrow is a function, each name a type. A later stage never reaches back into an
//! earlier one. Named contexts ([`context::NamedContexts`]) are looked up by `plan::graph`
//! wherever a stage or an image is named; those that steps read are opened when there is a plan.
//!
//! # The modules
//!
//! | module | what it is | what it does not know |
//! | --- | --- | --- |
//! | [`dockerfile`] | text → instructions, word expansion | files, images |
//! | [`lint`] | what in a Dockerfile is surely not meant | files, network |
//! | [`call`] | checks, outline and targets for programs and people | files, network |
//! | [`plan`] | instructions + base configs → steps | files, network |
//! | [`image`] | values of the image specification | files, network |
//! | [`context`] | what COPY and ADD may see | images |
//! | [`session`] | secrets and SSH agents lent to steps | steps, mounts |
//! | [`store`] | blobs, trees and records on disk, and how long they stay | registries |
//! | [`registry`] | the distribution protocol | layers' content |
//! | [`remote`] | files and git repositories of other servers | images, Dockerfiles |
//! | [`layout`] | an image in a directory of this machine → manifest, config, blobs | layers' content |
//! | [`layer`] | the layer archive, both directions | Dockerfiles, registries |
//! | [`rootfs`] | unpacked layers ⇄ a mounted filesystem | archives |
//! | [`sandbox`] | one process in one root filesystem | images, Dockerfiles |
//! | [`build`] | performs a plan: joins the leaves above | the service, the terminal |
//! | [`export`] | an image, or its files → a file or directory | how it was built |
//! | [`pipeline`] | a whole build, read top to bottom | |
//! | [`service`] | the webhook, the queue, the page | how an image is built |
//! | [`cli`] | arguments and terminal | everything but requests and events |
//! | [`config`] | the service's settings, as one table | what they are used for |
//! | [`failure`] | which kind of failure an error is, and advice | |
//!
//! Shared by all: [`io`], [`secret`], [`confined`], [`owners`], [`progress`].
//!
//! # Invariants
//!
//! - `dockerfile`, `plan`, `lint`, `call` and `image` do no I/O, start no process, read no
//!   clock and no environment variable. Time and platform arrive as values.
//! - Only `sandbox` and `service::child` start processes, `registry::credentials`
//!   credential helpers, and `remote::git` `ssh`. Only `registry`, `remote`, `service` and
//!   `session` open sockets.
//! - Nothing depends on `service` or `cli`. `registry` and `layer` reach blobs only
//!   through `store`.
//! - Only `cli` and `main` print. Everything else emits a [`progress::BuildEvent`] or a
//!   `tracing` event.
//! - Same inputs, same bytes: sorted listings, sorted maps in anything serialised, times
//!   clamped to one given epoch, no host names or paths in output.
//! - Whatever has a name in the store is complete; whatever is unfinished is in its `tmp/`.
//!   What a build has looked up there stays until that build ends, whoever prunes.
//! - Names that somebody else chose are resolved through [`confined`] or the root
//!   filesystem's own view, never by joining texts.
//!
//! `tests/it/modules.rs` compares who uses whom with a table.
//!
//! # A build
//!
//! `main` asks [`sandbox::enter`] to enter the user and mount namespaces before any
//! thread exists, then calls [`pipeline::build`]. That opens the context, parses, asks
//! [`plan::graph()`] which images are needed and resolves them until none is missing,
//! lowers, and says what the checks find. [`plan::join()`] makes one graph of the plans of
//! several platforms. [`build::build`] gives each step a task.
//! A RUN step that is not in the cache unpacks the layers below it (each straight from
//! the network into its own tree), mounts them as an overlay, runs the process in a
//! [`sandbox::Sandbox`], and keeps the overlay's upper directory: that is the new layer's
//! tree. Sealing (tar, diff ID, gzip, digest: one pass in [`layer::seal`]) and uploading
//! go on beside the next step. Other machines' caches are read meanwhile, and exported when
//! the image is out; a layer of theirs that is gone when it is needed has the build begin again
//! without it. COPY works out its changes without any root filesystem, and asks
//! listings of the layers below where nothing unpacks them ([`rootfs::Listing`]); its files
//! are hashed on their way into the layer, or known from the context's stat cache;
//! what ADD names by URL or in git, [`remote::Fetcher`] fetches first.
//!
//! # A look at the host
//!
//! `sockless doctor` enters nothing itself. [`sandbox::doctor`] tries each rung in a process of its
//! own; another one enters what a build would enter, and [`pipeline::doctor::inside`] tries
//! sandboxes, networks, root filesystems and the store there; [`registry::Client::examine`] asks
//! registries. [`pipeline::doctor`] joins what they say.
//!
//! # A webhook
//!
//! `service::webhook` verifies the signature over the raw body, and answers when the job is
//! in the database. `service::worker` claims it, fetches Dockerfile and `spec.json` at the
//! merged commit, and runs `sockless build --progress rawjson` as a child; its events are
//! the job's log.

#![cfg_attr(
    test,
    allow(
        clippy::disallowed_methods,
        reason = "unit tests start the programs that they compare with"
    )
)]

pub mod build;
pub mod call;
pub mod cli;
pub mod config;
pub mod confined;
pub mod context;
pub mod dockerfile;
pub mod export;
pub mod failure;
pub mod image;
pub mod io;
pub mod layer;
pub mod layout;
pub mod lint;
pub mod owners;
pub mod pipeline;
pub mod plan;
pub mod progress;
pub mod registry;
pub mod remote;
pub mod rootfs;
pub mod sandbox;
pub mod secret;
pub mod service;
pub mod session;
pub mod store;
