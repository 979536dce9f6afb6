//! The holes that builders of images have really had, tried on the program itself.
//!
//! Rows S1 to S22 are classes of vulnerabilities; README.md says which they are and which tests
//! stand for each. The reproducers are written anew from the descriptions of the advisories. A
//! test plants a canary outside of where anything may happen, makes the attack, and finds the
//! canary as it was. Those about steps run on every [`rung`](crate::support::rungs).

/// What archives say: names, links, sizes.
mod archives;
/// Archives and documents that are too much.
mod bombs;
/// What of a canary is seen.
mod canary;
/// Where a context ends: links, repositories.
mod contexts;
/// What steps have mounted.
mod mounts;
/// Directories that images are written to.
mod outputs;
/// Where secrets are found again.
mod secrets;
/// What a step sees and leaves.
mod steps;
/// Accounts of images.
mod users;

/// The registry of base images, or the end of the test.
macro_rules! upstream {
    () => {
        match crate::support::images::busybox() {
            Ok(registry) => registry,
            Err(reason) => skip!("{reason}"),
        }
    };
}
use upstream;
