//! The tests that run the program itself.
//!
//! They start real registries (`docker-registry`, Debian's build of registry:2) on the loopback,
//! read what was pushed with `skopeo`, and check it with code that shares nothing with the program
//! ([`support::oci`], [`support::tarball`]). The names say what a test needs: `sandbox_…` user
//! namespaces, `compose_…` the services that `compose.yaml` also has. A test whose needs the
//! machine cannot meet says `skipped: …` and passes; `SOCKLESS_TEST_REQUIRE_ALL=1` makes it fail.
//!
//! Variables: `SOCKLESS_TEST_BIN` (the program, instead of the one that Cargo built),
//! `SOCKLESS_TEST_CACHE` (where base images are kept between runs, instead of `target/fixtures`),
//! `SOCKLESS_TEST_REGISTRY` (`HOST:PORT` of a plain registry for machines without
//! `docker-registry`), `SOCKLESS_TEST_DEBIAN_MIRROR`,
//! `SOCKLESS_TEST_SEED` (what [`soak`] and [`kills`] kill); those of [`conformance`] stand there.

// Tests are where processes are started, and where text is printed for whoever reads the run.
#![allow(clippy::disallowed_methods, clippy::print_stderr)]
// A test binary has no outside: `pub` says what a module offers to the others.
#![allow(unreachable_pub)]

#[macro_use]
mod support;

/// The program as a file: static, and content with an empty root.
mod binary;
/// What Dockerfiles do, on a base of one busybox.
mod build;
/// Which steps the cache spares, here and on other machines.
mod cache;
/// Caches whose layers go away while a build uses them.
mod cache_lost;
/// `--check`, `--call`: questions that are answered without building.
mod check;
/// `compose.yaml` and `certs/make.sh`.
mod compose;
/// How layers are compressed, and when they are sent.
mod compression;
/// What BuildKit makes of the cases of `fixtures/conformance`.
mod conformance;
/// What steps read of a context: every change is seen, and nothing of it can be changed.
mod content;
/// Dockerfiles in, typed instructions or exact messages out: `fixtures/dockerfiles`.
mod dockerfile;
/// `doctor`, on hosts that are broken for it.
mod doctor;
/// `--explain`: why a step was not found in the cache.
mod explain;
/// Disks that are full or read-only, programs that are missing, stores of other versions.
mod faults;
/// Layers that go up while they are made: to several registries, slow ones, stopped ones.
mod growing;
/// Builds killed at every moment of their work.
mod kills;
/// Rungs of the ladder on which steps are isolated less.
mod ladder;
/// What of a base image is fetched and made, and how often.
mod lazy;
/// How much RUN steps may use, and what is said where nothing holds them to that.
mod limits;
/// How much memory a build takes.
mod memory;
/// Which module may use which.
mod modules;
/// What RUN steps have mounted, over several builds, and devices.
mod mounts;
/// `--output`: archives, layouts, directories.
mod outputs;
/// Users and owners for whoever has one ID only.
mod owners;
/// Several platforms in one build, and how many steps run at once.
mod platforms;
/// What README says of settings is what the program has.
mod readme;
/// Registries: credentials, transport, what is sent and what is not.
mod registry;
/// The same inputs give the same bytes, however they are built.
mod reproducible;
/// One process in each sandbox, by each kind of user.
mod sandbox;
/// A merged pull request becomes a pushed image whose Apache answers.
mod scenario;
/// The known holes of builders, tried.
mod security;
/// `sockless serve` over a real socket.
mod service;
/// SSH agents and keys, as OpenSSH's own programs see them.
mod session;
/// 200 builds on one store, killed at random.
mod soak;
/// Contexts, ADD and dates from servers and repositories.
mod sources;
/// Where COPY and ADD have their files from: servers, contexts that change, our own images.
mod sources_add;
/// What the store has and gives up: `prune`, `du`, `ls`, `store verify`.
mod store;
