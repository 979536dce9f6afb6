//! Unpacked layers ⇄ a mounted root filesystem. Knows nothing about archives.
//!
//! A [`Tree`] is one unpacked layer in overlay form: whiteouts are character
//! devices 0/0, opaque directories carry `user.overlay.opaque=y`. A [`Stack`] is a
//! list of trees looked at as one filesystem, without mounting anything; a [`LayerView`]
//! is the same where only a [`Listing`] of a layer may be there. A
//! [`Rootfs`] is a writable one; what was changed in it is a new tree, and
//! [`changes`] says what that tree does to the stack below it. [`materialize()`] is the
//! way back, from a list of changes to a tree.
//!
//! A [`Backend`] makes root filesystems: by overlay mounts, or by copies where none can be
//! mounted. Overlay filesystems are mounted with `userxattr`, by root too, so that a tree is
//! the same whoever made it.
//!
//! A tree's root directory is no entry of its layer. Its mode in an image is always
//! 0755, whatever the directory on disk has, as containerd's overlay snapshotter does
//! it. Where it is opaque, it hides all trees below, as the image specification says
//! and the kernel does not.
//!
//! <https://github.com/opencontainers/image-spec/blob/main/layer.md#representing-changes>
//! <https://docs.kernel.org/filesystems/overlayfs.html>

mod backend;
mod change;
mod diff;
mod inherit;
pub(crate) mod listing;
mod materialize;
mod overlay;
mod ownership;
mod plain;
mod stack;
mod stand_ins;
mod stubs;
#[cfg(test)]
pub(crate) mod testing;
mod tree;
mod xattr;

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

pub use backend::{Backend, Choice, Rootfs, choose};
pub use change::{
    Change, ChangeKind, Data, Entry, FileContent, FileSource, Metadata, OpenFile, OpenReader, Time,
    order,
};
pub use diff::{Changes, changes};
pub use inherit::inherit_metadata;
pub use listing::Listing;
pub(crate) use materialize::copy as copy_content;
pub use materialize::materialize;
pub use overlay::Changed;
pub use ownership::{keep_owners, learn_owners};
pub use stack::{LayerForm, LayerView, Node, Stack};
pub use stand_ins::{StandIn, StandInKind};
pub use stubs::MountPoint;
#[cfg(test)]
pub(crate) use testing::{has_many_ids, in_worlds, line, tree_of};
pub use tree::Tree;
pub use xattr::belongs_in_layer;

/// What can go wrong with a root filesystem.
#[derive(Debug, Error)]
pub enum RootfsError {
    /// A file operation failed.
    #[error("{action} {path:?}")]
    Io {
        /// Such as `reading`.
        action: &'static str,
        /// What it was done to; inside the image where it has no leading slash.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The kernel refused the mount.
    #[error("mounting an overlay of {layers} layers at {path:?}{}", said(.messages))]
    Mount {
        /// Where.
        path: PathBuf,
        /// The number of layers below the writable one.
        layers: usize,
        /// What the kernel had to say beyond the error number; may be empty.
        messages: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// More layers than the kernel takes.
    #[error("the image has {layers} layers, this kernel can mount {limit}; {hint}")]
    TooManyLayers {
        /// How many there are.
        layers: usize,
        /// How many are possible.
        limit: usize,
        /// What to do about it.
        hint: &'static str,
    },
    /// A mount point is there, but not what was asked for.
    #[error("mount point {path:?} is {found}, want {want}")]
    MountPoint {
        /// Inside the image.
        path: PathBuf,
        /// What it is.
        found: &'static str,
        /// What it has to be.
        want: &'static str,
    },
    /// A directory or file in the upper directory refers to content elsewhere, which a layer cannot express.
    #[error(
        "{path:?} carries the overlay attribute {attribute:?}, which sockless never asks the kernel for"
    )]
    Redirect {
        /// Inside the image.
        path: PathBuf,
        /// The attribute's name.
        attribute: &'static str,
    },
    /// A change that cannot become part of a tree.
    #[error("cannot put {path:?} into a layer: {reason}")]
    BadChange {
        /// Its path.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A file's content was not as long as announced.
    #[error("{path:?} has changed while it was read: got {got} bytes, want {want}")]
    Size {
        /// Inside the image.
        path: PathBuf,
        /// What was read, at most one more than `want`.
        got: u64,
        /// What was announced.
        want: u64,
    },
    /// An attribute that is none of a layer's.
    #[error("{path:?} has the extended attribute {name:?}, which does not belong into layers")]
    Attribute {
        /// Inside the image.
        path: PathBuf,
        /// The attribute.
        name: std::ffi::OsString,
    },
}

impl RootfsError {
    /// Wraps an error with what was attempted.
    pub(crate) fn io<E: Into<io::Error>>(
        action: &'static str,
        path: &Path,
    ) -> impl FnOnce(E) -> Self + use<E> {
        let path = path.to_owned();
        move |source| Self::Io {
            action,
            path,
            source: source.into(),
        }
    }
}

fn said(messages: &str) -> String {
    if messages.is_empty() {
        String::new()
    } else {
        format!(" (the kernel says: {messages})")
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;
    use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, lchown, symlink};
    use std::time::{Duration, SystemTime};

    use rustix::fs::{CWD, FileType, Mode, XattrFlags};

    use super::testing::{View, has_many_ids, in_worlds, view_of_dir, view_of_stack};
    use super::*;

    /// A generator of numbers that is the same everywhere (xorshift64*).
    struct Dice(u64);

    impl Dice {
        fn roll(&mut self, sides: u64) -> u64 {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % sides
        }

        /// A path of one to three names out of few, so that most exist already.
        fn path(&mut self, root: &Path) -> PathBuf {
            let mut path = root.to_owned();
            for _ in 0..=self.roll(3) {
                path.push(["a", "b", "b c", "\u{e9}"][self.roll(4) as usize]);
            }
            path
        }
    }

    /// Does one thing in `root`. What is impossible, such as a directory in a file, is
    /// left undone, and says why.
    fn act(dice: &mut Dice, root: &Path) -> std::io::Result<()> {
        let (path, other) = (dice.path(root), dice.path(root));
        let mode = [0o755, 0o700, 0o4711, 0o1777, 0o640, 0o0][dice.roll(6) as usize];
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000 + dice.roll(3));
        let length = dice.roll(3);
        let text = "x".repeat(length as usize);
        let attribute = ["user.a", "user.b", "security.capability"][dice.roll(3) as usize];
        // `cap_chown=ep` of revision 2.
        let mut value = vec![1, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        value[4] = 1 + dice.roll(2) as u8;
        let is_link = path.is_symlink();
        // A pipe must not wait for its other end.
        let without_waiting = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap();
        let mut options = fs::OpenOptions::new();
        options.custom_flags(without_waiting);
        match dice.roll(21) {
            0 | 1 => {
                let options = options.write(true).create(true).truncate(true);
                options.open(&path)?.write_all(text.as_bytes())
            }
            2 | 3 => fs::create_dir_all(&path),
            4 => fs::remove_file(&path),
            5 => fs::remove_dir_all(&path),
            6 => {
                // Leaves an opaque directory where there was one below.
                let _ = fs::remove_dir_all(&path);
                fs::create_dir(&path)
            }
            7 => fs::rename(&path, &other),
            8 => symlink(other.strip_prefix(root).unwrap(), &path),
            9 => fs::hard_link(&path, &other),
            10 if !is_link => fs::set_permissions(&path, fs::Permissions::from_mode(mode)),
            11 if has_many_ids() => lchown(&path, Some(mode % 7), Some(mode % 5)),
            // Opened for reading, a file is not copied up by that.
            12 if !is_link => options.read(true).open(&path)?.set_modified(time),
            13 => {
                let made = rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::RUSR, 0);
                Ok(made?)
            }
            14 if !is_link => {
                let set = rustix::fs::lsetxattr(&path, attribute, &value, XattrFlags::empty());
                Ok(set?)
            }
            // Copies it up and changes nothing.
            15 => options.append(true).open(&path).map(drop),
            16 => {
                let _ = fs::remove_dir_all(&path);
                options.write(true).create_new(true).open(&path).map(drop)
            }
            17 => {
                let _ = fs::remove_file(&path);
                fs::create_dir_all(path.join("a"))
            }
            18 => std::os::unix::net::UnixListener::bind(&path).map(drop),
            19 => options.write(true).open(&path)?.set_len(length * 100_000),
            20 if !is_link => Ok(rustix::fs::removexattr(&path, attribute)?),
            _ => Ok(()),
        }
    }

    /// What layers can say: no sockets, and no time of a directory whose time alone has
    /// changed.
    fn of_layers(mut view: View) -> View {
        view.retain(|_, seen| seen.kind != "Socket");
        for seen in view.values_mut() {
            if seen.kind == "Directory" {
                seen.metadata.mtime = Time::default();
            }
        }
        view
    }

    fn compare(what: &str, got: &View, want: &View) {
        for path in got.keys().chain(want.keys()) {
            assert_eq!(got.get(path), want.get(path), "{what}: {path:?}");
        }
    }

    #[test]
    fn sandbox_stack_and_changes_agree_with_the_kernel() {
        in_worlds(
            module_path!(),
            "sandbox_stack_and_changes_agree_with_the_kernel",
            || {
                let mut entries = 0;
                for seed in 1..=8 {
                    let dir = tempfile::tempdir().unwrap();
                    let mut dice = Dice(seed * 0x9E37_79B9);
                    let mut lower = Stack::default();
                    // The same image from trees that were made from the changes alone.
                    let mut again = Stack::default();
                    for layer in 0..5 {
                        let what = format!("seed {seed} layer {layer}");
                        let scratch = dir.path().join(format!("scratch{layer}"));
                        fs::create_dir(&scratch).unwrap();
                        let rootfs = Backend::Overlay.open(&lower, &scratch).unwrap();
                        for _ in 0..40 {
                            let _ = act(&mut dice, rootfs.path());
                        }
                        let kernel = view_of_dir(rootfs.path());
                        entries += kernel.len();
                        let upper = rootfs.finish().unwrap().upper;
                        let tree = Tree::open(&upper).unwrap();
                        // A tree is renamed into place while it is in use.
                        fs::rename(&upper, dir.path().join(format!("tree{layer}"))).unwrap();

                        let list = || changes(&tree, &lower).map(Result::unwrap);
                        let paths: Vec<PathBuf> = list().map(|change| change.path).collect();
                        let is_ordered = |pair: &[PathBuf]| order(&pair[0], &pair[1]).is_lt();
                        assert!(paths.windows(2).all(is_ordered), "{what}: {paths:?}");

                        let remade = dir.path().join(format!("remade{layer}"));
                        fs::create_dir(&remade).unwrap();
                        materialize(list(), &remade).unwrap();
                        let remade = Tree::open(&remade).unwrap();

                        // The list taken from the new tree is the list.
                        let lines = |list: Changes| -> Vec<String> {
                            list.map(|change| testing::line(change.unwrap())).collect()
                        };
                        assert_eq!(
                            lines(changes(&remade, &lower)),
                            lines(changes(&tree, &lower)),
                            "{what}"
                        );

                        lower.push(tree);
                        again.push(remade);
                        let stack = view_of_stack(&lower);
                        compare(&format!("{what}: stack, kernel"), &stack, &kernel);
                        let again = view_of_stack(&again);
                        compare(
                            &format!("{what}: again, kernel"),
                            &of_layers(again),
                            &of_layers(kernel),
                        );
                    }
                }
                // The operations did build something.
                assert!(entries > 8 * 5 * 5, "{entries}");
            },
        );
    }

    /// A list of changes, one line each; times from `start` on are those of the test itself.
    fn dated(list: Changes, start: Time) -> Vec<String> {
        let line = |change: Result<Change, RootfsError>| {
            let change = change.unwrap();
            let time = match &change.kind {
                ChangeKind::Removed => String::new(),
                ChangeKind::Entry(entry) if entry.metadata.mtime >= start => "now".to_owned(),
                ChangeKind::Entry(entry) => entry.metadata.mtime.seconds.to_string(),
            };
            format!("{} {time}", testing::line(change))
        };
        list.map(line).collect()
    }

    fn without_present(mut view: View, start: Time) -> View {
        for seen in view.values_mut() {
            seen.metadata.mtime = seen.metadata.mtime.min(start);
        }
        view
    }

    #[test]
    fn sandbox_copies_and_overlays_give_the_same_changes() {
        in_worlds(
            module_path!(),
            "sandbox_copies_and_overlays_give_the_same_changes",
            || {
                let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
                let start = Time {
                    seconds: now.unwrap().as_secs() as i64,
                    nanoseconds: 0,
                };
                let (mut done, mut listed) = (0, 0);
                for seed in 1..=12 {
                    let dir = tempfile::tempdir().unwrap();
                    let mut dice = Dice(seed * 0x5851_F42D);
                    let mut stacks = [Stack::default(), Stack::default()];
                    for layer in 0..5 {
                        let what = format!("seed {seed} layer {layer}");
                        let open = |backend: Backend, stack: &Stack| {
                            let scratch = dir.path().join(format!("{backend:?}{layer}"));
                            fs::create_dir(&scratch).unwrap();
                            backend.open(stack, &scratch).unwrap()
                        };
                        let overlay = open(Backend::Overlay, &stacks[0]);
                        let copied = open(Backend::Copy, &stacks[1]);
                        for number in 0..40 {
                            let mut again = Dice(dice.0);
                            let got = act(&mut dice, overlay.path());
                            let got = got.map_err(|error| error.raw_os_error());
                            // Directories of lower layers cannot be renamed in an overlay.
                            if got == Err(Some(rustix::io::Errno::XDEV.raw_os_error())) {
                                continue;
                            }
                            let copy = act(&mut again, copied.path());
                            let copy = copy.map_err(|error| error.raw_os_error());
                            assert_eq!(copy, got, "{what}: act {number}");
                            done += usize::from(got.is_ok());
                        }
                        let seen = view_of_dir(copied.path());
                        compare(
                            &format!("{what}: copy, overlay"),
                            &without_present(seen.clone(), start),
                            &without_present(view_of_dir(overlay.path()), start),
                        );
                        let trees = [overlay, copied].map(|rootfs| {
                            let upper = rootfs.finish().unwrap().upper;
                            Tree::open(&upper).unwrap()
                        });
                        let lists: Vec<Vec<String>> = (trees.iter().zip(&stacks))
                            .map(|(tree, stack)| dated(changes(tree, stack), start))
                            .collect();
                        assert_eq!(lists[1], lists[0], "{what}");
                        listed += lists[0].len();
                        for (stack, tree) in stacks.iter_mut().zip(trees) {
                            stack.push(tree);
                        }
                        // The tree is what the process left, to the last nanosecond.
                        let stack = view_of_stack(&stacks[1]);
                        compare(&format!("{what}: stack, copy"), &stack, &seen);
                        // Whatever a step is done in, the next may be done in the other.
                        stacks.swap(0, 1);
                        let newest = without_present(view_of_stack(&stacks[0]), start);
                        let other = without_present(view_of_stack(&stacks[1]), start);
                        compare(&format!("{what}: stacks"), &newest, &other);
                    }
                }
                // The operations did build something.
                assert!(done > 12 * 5 * 10 && listed > 12 * 5 * 5, "{done} {listed}");
            },
        );
    }

    #[test]
    fn sandbox_an_image_from_its_trees_is_mounted_as_it_was() {
        in_worlds(
            module_path!(),
            "sandbox_an_image_from_its_trees_is_mounted_as_it_was",
            || {
                let dir = tempfile::tempdir().unwrap();
                let (_base, base) = testing::tree_of(&["755 d/", "644 d/a = 1", "644 d/b = 2"]);
                let (_top, top) = testing::tree_of(&["755 d!/", "644 d/c = 3"]);
                // The same layer twice, which the kernel would refuse.
                let stack = Stack::new(vec![top.clone(), base, top.clone()]);
                let rootfs = Backend::Overlay.open(&stack, dir.path()).unwrap();
                compare("view", &view_of_stack(&stack), &view_of_dir(rootfs.path()));
                let names = |path: &Path| -> Vec<String> {
                    let names = fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name());
                    names.map(|n| n.into_string().unwrap()).collect()
                };
                assert_eq!(names(&rootfs.path().join("d")), ["c"]);
                let root = fs::metadata(rootfs.path()).unwrap();
                assert_eq!((root.mode(), root.uid(), root.gid()), (0o40755, 0, 0));
                assert_eq!(root.mtime(), fs::metadata(top.path()).unwrap().mtime());
                rootfs.discard();
                assert_eq!(names(dir.path()), Vec::<String>::new());
            },
        );
    }
}
