//! [`StatCache`]: digests of the files of a context, as long as the files are as they were.
//!
//! A file is known by device, inode, size, modification and change time. Where all of them
//! are what they were when it was hashed, it is not read again.
//!
//! # Why a hit is right
//!
//! Whatever changes a file, its name or its metadata, sets its change time to the current
//! time of the file system, and nobody can set it to another: `touch -d` moves only the
//! modification time, and is itself such a change. A file that was put in the place of
//! another, even with its inode number, has a change time of its own. What is left is a
//! change so soon after the last one that both have the same time. So a digest is kept only
//! where both times were past by more than the file system's granularity when hashing
//! *began*, and where the file was the same when hashing had ended. A file with a time in
//! the future, wherever that comes from, is hashed every time.
//!
//! That compares the times of files with this machine's clock, so it is done only where
//! they are made by it: on the file systems of [`LOCAL_FILE_SYSTEMS`]. On all others (NFS,
//! CIFS, 9p, FUSE, FAT, …) the clock is somebody else's, change times may be made up, or
//! what `stat` says may be old; there is no cache there, and files are hashed each time.
//! Files of the context that lie on another device than its root are treated so as well.
//! An overlay may show a file under another inode number after it was mounted anew; then it
//! is hashed once more.
//!
//! A clock that is set back is no danger as long as no change falls into the very tick of an
//! earlier one. Like every program that goes by times of files, this one does not see writes
//! through a shared memory mapping after the first, until the kernel has written them out.
//!
//! # The file
//!
//! ```text
//! cache/stat/<sha256 of the context's path>
//!     "sockless stat 1\n"
//!     entries of 80 bytes in ascending order: device, inode, size (8 bytes each),
//!         mtime, ctime (8 bytes of seconds, 4 of nanoseconds), SHA-256 (32)
//!     the SHA-256 of all of it
//! ```
//!
//! Numbers are big-endian; those of the key come first, so that the order of bytes is that
//! of keys. A file that is not exactly that is as good as none. It is replaced as a whole;
//! of two builds that write it at once, the later one's stays. What neither this build nor
//! the last one saw goes away.

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::Stat;

use crate::image::{Digest, Hasher};
use crate::rootfs::Time;
use crate::store::{Store, StoreError};

/// The first bytes of the file. Counts up with its format.
const MAGIC: &[u8; 16] = b"sockless stat 1\n";

/// The bytes of a [`FileState`].
const KEY_BYTES: usize = 48;

/// The bytes of an entry.
const ENTRY_BYTES: usize = KEY_BYTES + DIGEST_BYTES;

const DIGEST_BYTES: usize = 32;

/// More entries are not kept: the file is read whole. 80 MiB.
const ENTRIES_LIMIT: usize = 1 << 20;

/// How many contexts are remembered; the ones that changed longest ago go away.
const CONTEXTS_LIMIT: usize = 256;

/// File systems whose times are made by this machine's kernel, and whose inodes have change
/// times: ext2 to ext4, XFS, Btrfs, tmpfs, overlay, F2FS, ZFS, bcachefs. The numbers are of
/// `statfs(2)`.
const LOCAL_FILE_SYSTEMS: [u64; 8] = [
    0xef53,
    0x5846_5342,
    0x9123_683e,
    0x0102_1994,
    0x794c_7630,
    0xf2f5_2010,
    0x2fc1_2fc1,
    0xca45_1a4e,
];

/// The longest tick of a kernel's clock is 10 ms; times of files are those of the last tick.
const FINE_GRANULARITY_NANOSECONDS: i128 = 100_000_000;

/// For files whose time is a whole second: the file system may know nothing finer. 2 s is
/// the coarsest that there is.
const COARSE_GRANULARITY_NANOSECONDS: i128 = 3_000_000_000;

/// What tells whether a file is still the one that it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct FileState {
    /// The device that it is on.
    pub(super) device: u64,
    /// Its number there.
    pub(super) inode: u64,
    /// The number of bytes.
    pub(super) size_bytes: u64,
    /// When its content last changed, or what somebody says.
    pub(super) mtime: Time,
    /// When anything of it last changed.
    pub(super) ctime: Time,
}

/// The digests of one context's files.
#[derive(Debug)]
pub(super) struct StatCache {
    /// Its own file.
    path: PathBuf,
    /// The device that its files are on.
    device: u64,
    /// The entries as they were read, one after the other.
    known: Vec<u8>,
    /// For each of those, whether it was asked for.
    seen: Vec<AtomicBool>,
    learned: Mutex<Learned>,
}

/// What this build found out.
#[derive(Debug, Default)]
struct Learned {
    entries: Vec<[u8; ENTRY_BYTES]>,
    /// How many of them are in the file.
    saved: usize,
}

impl FileState {
    /// The state of an open file.
    pub(super) fn of(file: impl AsFd) -> Option<Self> {
        rustix::fs::fstat(file).ok().map(|stat| Self::from(&stat))
    }

    /// Whether later changes will show: all times are past by more than what the file system
    /// tells apart, at the time `now`.
    fn is_settled(&self, now: Time) -> bool {
        let is_past = |time: Time| {
            let granularity = match time.nanoseconds {
                0 => COARSE_GRANULARITY_NANOSECONDS,
                _ => FINE_GRANULARITY_NANOSECONDS,
            };
            nanoseconds(time) + granularity < nanoseconds(now)
        };
        is_past(self.mtime) && is_past(self.ctime)
    }

    fn to_bytes(self) -> [u8; KEY_BYTES] {
        // Seconds before 1970 have the highest bit; they keep their order among each other.
        let time = |time: Time| (time.seconds.to_be_bytes(), time.nanoseconds.to_be_bytes());
        let ((mtime, mtime_ns), (ctime, ctime_ns)) = (time(self.mtime), time(self.ctime));
        let fields: [&[u8]; 7] = [
            &self.device.to_be_bytes(),
            &self.inode.to_be_bytes(),
            &self.size_bytes.to_be_bytes(),
            &mtime,
            &mtime_ns,
            &ctime,
            &ctime_ns,
        ];
        let mut bytes = [0; KEY_BYTES];
        for (to, from) in bytes.iter_mut().zip(fields.into_iter().flatten()) {
            *to = *from;
        }
        bytes
    }
}

impl From<&Stat> for FileState {
    #[allow(
        clippy::unnecessary_cast,
        clippy::cast_possible_wrap,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the fields' types differ between architectures; all values fit"
    )]
    fn from(stat: &Stat) -> Self {
        Self {
            device: stat.st_dev as u64,
            inode: stat.st_ino as u64,
            size_bytes: stat.st_size as u64,
            mtime: Time {
                seconds: stat.st_mtime as i64,
                nanoseconds: stat.st_mtime_nsec as u32,
            },
            ctime: Time {
                seconds: stat.st_ctime as i64,
                nanoseconds: stat.st_ctime_nsec as u32,
            },
        }
    }
}

fn nanoseconds(time: Time) -> i128 {
    i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanoseconds)
}

/// The time by which the kernel dates files, at most a tick later.
pub(super) fn now() -> Time {
    // Before 1970 nothing is settled.
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.unwrap_or_default();
    Time {
        seconds: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
        nanoseconds: now.subsec_nanos(),
    }
}

impl StatCache {
    /// The cache of the context whose directory is `path`, open as `dir`. `None` where there
    /// can be none; see the module. A file that cannot be read is as good as none.
    pub(super) fn open(store: &Store, path: &Path, dir: impl AsFd) -> Option<Self> {
        let (found, file_system) = (
            rustix::fs::fstat(&dir).ok()?,
            rustix::fs::fstatfs(&dir).ok()?,
        );
        #[allow(
            clippy::unnecessary_cast,
            clippy::cast_sign_loss,
            reason = "the type differs between architectures; 32 bits count"
        )]
        let kind = file_system.f_type as u64 & 0xffff_ffff;
        if !LOCAL_FILE_SYSTEMS.contains(&kind) {
            tracing::debug!(path = %path.display(), kind, "no stat cache on this file system");
            return None;
        }
        let name = path.canonicalize().ok()?;
        let name = Digest::of(name.as_os_str().as_encoded_bytes());
        let path = store.stat_cache_path().join(name.hex());
        Some(Self::read(path, FileState::from(&found).device))
    }

    fn read(path: PathBuf, device: u64) -> Self {
        let known = match fs::read(&path) {
            Ok(bytes) => entries_of(bytes).unwrap_or_else(|| {
                tracing::warn!(path = %path.display(), "a damaged stat cache is not used");
                Vec::new()
            }),
            Err(_) => Vec::new(),
        };
        let mut seen = Vec::new();
        seen.resize_with(known.len() / ENTRY_BYTES, AtomicBool::default);
        Self {
            path,
            device,
            known,
            seen,
            learned: Mutex::default(),
        }
    }

    /// The digest of the file that is in `state`, if it is known.
    pub(super) fn get(&self, state: &FileState) -> Option<Digest> {
        let key = state.to_bytes();
        let (entries, _) = self.known.as_chunks::<ENTRY_BYTES>();
        let at = entries
            .binary_search_by(|entry| entry[..KEY_BYTES].cmp(&key))
            .ok()?;
        self.seen.get(at)?.store(true, Ordering::Relaxed);
        let digest = entries[at].last_chunk::<DIGEST_BYTES>()?;
        Some(Digest::from_bytes(digest))
    }

    /// Remembers that the file that is in `state` has this digest. It must have been in that
    /// state when hashing began, at the time `since`, and when it had ended. Where a later
    /// change might not show, nothing is remembered.
    pub(super) fn learn(&self, state: &FileState, digest: &Digest, since: Time) {
        if state.device != self.device || !state.is_settled(since) {
            return;
        }
        let mut entry = [0; ENTRY_BYTES];
        let (key, value) = entry.split_at_mut(KEY_BYTES);
        key.copy_from_slice(&state.to_bytes());
        value.copy_from_slice(&digest.to_bytes());
        self.learned().entries.push(entry);
    }

    fn learned(&self) -> std::sync::MutexGuard<'_, Learned> {
        self.learned
            .lock()
            .expect("nothing panics while it holds this lock")
    }

    /// Writes the file anew if something was learned since the last time.
    ///
    /// # Errors
    /// That the store cannot be written; a build goes on without.
    pub(super) fn save(&self, store: &Store) -> Result<(), StoreError> {
        // Two steps that end at once write one after the other.
        let mut learned = self.learned();
        if learned.saved == learned.entries.len() {
            return Ok(());
        }
        let mut entries = learned.entries.clone();
        let (known, _) = self.known.as_chunks::<ENTRY_BYTES>();
        let (seen, unseen): (Vec<_>, Vec<_>) = known
            .iter()
            .zip(&self.seen)
            .partition(|(_, seen)| seen.load(Ordering::Relaxed));
        entries.extend(seen.into_iter().map(|(entry, _)| *entry));
        entries.sort_unstable();
        entries.dedup_by(|a, b| a[..KEY_BYTES] == b[..KEY_BYTES]);
        // A build of another target may have read other files; what is gone for good is never
        // more than what is there. A file that was seen in another state is not in this one.
        if unseen.len() <= entries.len() {
            let of_file = |entry: &[u8; ENTRY_BYTES]| entry.first_chunk::<16>().copied();
            let mut files: Vec<_> = entries.iter().map(of_file).collect();
            files.dedup();
            let is_other =
                |entry: &[u8; ENTRY_BYTES]| files.binary_search(&of_file(entry)).is_err();
            let unseen = unseen.into_iter().map(|(entry, _)| *entry);
            entries.extend(unseen.filter(is_other));
            entries.sort_unstable();
        }
        entries.truncate(ENTRIES_LIMIT);
        let mut bytes = Vec::with_capacity(MAGIC.len() + entries.len() * ENTRY_BYTES + 32);
        bytes.extend(MAGIC);
        bytes.extend(entries.as_flattened());
        bytes.extend(Digest::of(&bytes).to_bytes());
        if !self.path.exists() {
            forget_oldest(&store.stat_cache_path());
        }
        store.write_file(&self.path, &bytes)?;
        learned.saved = learned.entries.len();
        Ok(())
    }
}

/// The entries in a file; `None` where it is damaged or of another version.
fn entries_of(mut bytes: Vec<u8>) -> Option<Vec<u8>> {
    let (content, digest) = bytes.split_last_chunk::<DIGEST_BYTES>()?;
    let entries = content.strip_prefix(MAGIC)?;
    let is_whole =
        entries.len().is_multiple_of(ENTRY_BYTES) && entries.len() / ENTRY_BYTES <= ENTRIES_LIMIT;
    let mut hasher = Hasher::new();
    hasher.update(content);
    if !is_whole || hasher.finish().to_bytes() != *digest {
        return None;
    }
    bytes.truncate(bytes.len() - DIGEST_BYTES);
    bytes.drain(..MAGIC.len());
    Some(bytes)
}

/// Makes room for one more context.
fn forget_oldest(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    let mut files: Vec<_> = entries
        .flatten()
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    files.sort();
    let too_many = (files.len() + 1).saturating_sub(CONTEXTS_LIMIT);
    for (_, path) in files.into_iter().take(too_many) {
        if let Err(error) = fs::remove_file(&path) {
            tracing::debug!(path = %path.display(), %error, "an old stat cache stays");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const THEN: Time = Time {
        seconds: 1_700_000_000,
        nanoseconds: 500_000_000,
    };

    fn later(milliseconds: i64) -> Time {
        let nanoseconds = nanoseconds(THEN) + i128::from(milliseconds) * 1_000_000;
        Time {
            seconds: i64::try_from(nanoseconds / 1_000_000_000).unwrap(),
            nanoseconds: u32::try_from(nanoseconds % 1_000_000_000).unwrap(),
        }
    }

    fn state(inode: u64) -> FileState {
        FileState {
            device: 7,
            inode,
            size_bytes: 100,
            mtime: THEN,
            ctime: THEN,
        }
    }

    struct Fixture {
        _dir: tempfile::TempDir,
        store: Store,
    }

    fn fixture() -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        Fixture { _dir: dir, store }
    }

    impl Fixture {
        fn path(&self) -> PathBuf {
            self.store.stat_cache_path().join("context")
        }

        fn open(&self) -> StatCache {
            StatCache::read(self.path(), 7)
        }

        /// What a build that hashes these files leaves behind.
        fn build(&self, files: &[(FileState, &[u8])]) {
            let cache = self.open();
            for (state, content) in files {
                if cache.get(state).is_none() {
                    cache.learn(state, &Digest::of(content), later(1_000_000));
                }
            }
            cache.save(&self.store).unwrap();
        }
    }

    #[test]
    fn a_file_is_known_in_exactly_the_state_in_which_it_was_hashed() {
        let fixture = fixture();
        let files: Vec<_> = (0..100).map(|inode| (state(inode), &b"a"[..])).collect();
        fixture.build(&files);
        let cache = fixture.open();
        for (state, _) in &files {
            assert_eq!(cache.get(state), Some(Digest::of(b"a")));
        }
        let known = state(5);
        for other in [
            state(100),
            FileState { device: 8, ..known },
            FileState {
                size_bytes: 101,
                ..known
            },
            FileState {
                mtime: later(1),
                ..known
            },
            // The modification time was put back; the change time says when.
            FileState {
                ctime: later(1),
                ..known
            },
        ] {
            assert_eq!(cache.get(&other), None, "{other:?}");
        }
        // Nothing new, nothing written.
        std::fs::remove_file(fixture.path()).unwrap();
        cache.save(&fixture.store).unwrap();
        assert!(!fixture.path().exists());
    }

    #[test]
    fn what_could_change_unseen_is_not_kept() {
        let fixture = fixture();
        let check = |mtime: Time, ctime: Time, since: Time, expected: bool| {
            let state = FileState {
                mtime,
                ctime,
                ..state(1)
            };
            let cache = fixture.open();
            cache.learn(&state, &Digest::of(b"a"), since);
            let kept = cache.learned().entries.len() == 1;
            assert_eq!(kept, expected, "{mtime:?} {ctime:?} {since:?}");
        };
        check(THEN, THEN, later(101), true);
        check(THEN, THEN, later(100), false);
        check(THEN, THEN, THEN, false);
        // The clock was set back, or the file's is ahead.
        check(THEN, THEN, later(-3_600_000), false);
        check(later(-5000), THEN, later(50), false);
        check(THEN, later(-5000), later(50), false);
        // Where only seconds are known, two changes in one second look the same.
        let coarse = Time {
            nanoseconds: 0,
            ..THEN
        };
        check(THEN, coarse, later(2400), false);
        check(THEN, coarse, later(2501), true);
        // A file of another file system.
        let cache = fixture.open();
        let elsewhere = FileState {
            device: 8,
            ..state(1)
        };
        cache.learn(&elsewhere, &Digest::of(b"a"), later(1000));
        assert!(cache.learned().entries.is_empty());
    }

    #[test]
    fn a_damaged_file_is_no_file() {
        let fixture = fixture();
        fixture.build(&[(state(1), b"a"), (state(2), b"b")]);
        let good = std::fs::read(fixture.path()).unwrap();
        assert_eq!(good.len(), 16 + 2 * 80 + 32);
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            std::fs::write(fixture.path(), bad).unwrap();
            assert_eq!(fixture.open().get(&state(1)), None, "{at}");
            std::fs::write(fixture.path(), &good[..at]).unwrap();
            assert_eq!(fixture.open().get(&state(1)), None, "{at}");
        }
        // It is replaced by the next build that learns something.
        fixture.build(&[(state(3), b"c")]);
        assert_eq!(fixture.open().get(&state(3)), Some(Digest::of(b"c")));
        // A directory in its place costs the cache and not the build.
        std::fs::remove_file(fixture.path()).unwrap();
        std::fs::create_dir(fixture.path()).unwrap();
        let cache = fixture.open();
        assert_eq!(cache.get(&state(3)), None);
        cache.learn(&state(3), &Digest::of(b"c"), later(1000));
        assert!(cache.save(&fixture.store).is_err());
    }

    #[test]
    fn of_two_builds_at_once_one_stays_whole() {
        let fixture = fixture();
        let (a, b) = (fixture.open(), fixture.open());
        a.learn(&state(1), &Digest::of(b"a"), later(1000));
        b.learn(&state(2), &Digest::of(b"b"), later(1000));
        a.save(&fixture.store).unwrap();
        b.save(&fixture.store).unwrap();
        let cache = fixture.open();
        assert_eq!(cache.get(&state(1)), None);
        assert_eq!(cache.get(&state(2)), Some(Digest::of(b"b")));
    }

    #[test]
    fn what_is_not_seen_goes_away() {
        let fixture = fixture();
        let all: Vec<_> = (0..10).map(|inode| (state(inode), &b"a"[..])).collect();
        fixture.build(&all);
        let known = |inode| fixture.open().get(&state(inode)).is_some();
        // One file is new, one has changed, and most are as they were: those that this build
        // does not read stay, the old state of the changed one does not.
        let changed = FileState {
            ctime: later(5),
            ..state(3)
        };
        let mut next = all[..6].to_vec();
        next[3].0 = changed;
        next.push((state(10), b"b"));
        fixture.build(&next);
        assert_eq!(fixture.open().known.len() / ENTRY_BYTES, 11);
        assert!(!known(3) && known(9) && known(10));
        assert!(fixture.open().get(&changed).is_some());
        // Few are left of many.
        fixture.build(&[(state(11), b"c")]);
        assert_eq!(fixture.open().known.len() / ENTRY_BYTES, 1);
        assert!(known(11));
    }

    #[test]
    fn the_contexts_that_changed_longest_ago_make_room() {
        let fixture = fixture();
        let dir = fixture.store.stat_cache_path();
        std::fs::create_dir_all(&dir).unwrap();
        for number in 0..CONTEXTS_LIMIT + 2 {
            let file = std::fs::File::create(dir.join(number.to_string())).unwrap();
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(number as u64);
            file.set_modified(time).unwrap();
        }
        fixture.build(&[(state(1), b"a")]);
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), CONTEXTS_LIMIT);
        assert!(!dir.join("2").exists() && dir.join("3").exists());
    }

    #[test]
    fn there_is_none_where_times_are_not_ours() {
        let fixture = fixture();
        let open = |path: &str| {
            let dir = std::fs::File::open(path).unwrap();
            StatCache::open(&fixture.store, Path::new(path), &dir)
        };
        assert!(open("/proc").is_none());
        assert!(open("/sys").is_none());
    }
}
