//! [`Listing`]: what a step reads, whose contents become known one after the other.
//!
//! A file's digest is known without reading it where the stat cache has it; else it is found
//! by hashing the file ahead, where a cache record might match, or falls out of copying it.
//! What was copied counts: the key under which a layer is recorded is that of the bytes that
//! are in the layer, whatever happened to the files before and meanwhile.

use std::fs::File;
use std::io::{self, Cursor, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, LazyLock, Mutex, OnceLock};

use rustix::fs::FileType;

use super::content::{ContentManifest, Entry, Kind, Source, xattrs_digest};
use super::copy::{CopyError, SourceNode, SourceTree};
use super::stat_cache::{self, FileState};
use crate::image::{Digest, Hasher};
use crate::rootfs::{Change, ChangeKind, Data, FileSource, OpenReader, Time};

/// Most files are read with one call.
const BUFFER_BYTES: usize = 128 << 10;

/// How many files are hashed at once. More would wait for the disk.
const HASHING_THREADS: usize = 8;

/// So many files are worth a thread.
const FILES_PER_THREAD: usize = 64;

/// Larger files are not read ahead.
const READ_AHEAD_BYTES: u64 = 128 << 10;

/// How many files are read ahead at most; with [`READ_AHEAD_BYTES`] this bounds the memory
/// to 4 MiB.
const FILES_AHEAD: usize = 32;

/// The digest of a file that is not known yet.
static NOTHING: LazyLock<Digest> = LazyLock::new(|| Digest::of(b""));

/// A tree, and how it is called.
#[derive(Clone)]
pub(super) struct Origin {
    /// Where files are read.
    pub(super) tree: Arc<dyn SourceTree>,
    /// What that is in errors, such as `the build context`.
    pub(super) place: &'static str,
    /// Whether times are part of what was fetched, and not only of where it lay.
    pub(super) is_dated: bool,
}

/// What a path is to a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// It is read.
    Content,
    /// It is an archive that is unpacked.
    Archive,
    /// It is there for what is in it.
    Parent,
}

/// What a step reads.
#[derive(Default)]
pub(super) struct Listing {
    sources: Vec<Listed>,
    files: Files,
}

/// One source of a listing.
struct Listed {
    source: Source,
    /// For each entry that is a file, by its place, which of [`Listing::files`] it is. Until
    /// [`Listing::manifest`], its digest is that of nothing.
    files: Vec<(usize, usize)>,
}

/// The regular files that a step reads.
#[derive(Default)]
struct Files {
    all: Vec<FileToRead>,
    /// Whether one changed while it was copied, so that no digest says what the copy is.
    is_torn: AtomicBool,
}

struct FileToRead {
    origin: Origin,
    node: SourceNode,
    /// From the stat cache, or from hashing.
    ahead: OnceLock<Digest>,
    /// Of what was copied.
    copied: OnceLock<Digest>,
}

impl Origin {
    pub(super) fn read_error(&self, path: &Path) -> impl FnOnce(io::Error) -> CopyError + use<> {
        let (path, place) = (path.to_owned(), self.place);
        move |source| CopyError::Read {
            path,
            place,
            source,
        }
    }

    /// Reads what belongs to the file beside its content: attributes, or a link's target. Who
    /// lists it and who copies it see the same.
    pub(super) fn complete(&self, node: &mut SourceNode) -> Result<(), CopyError> {
        if node.file_type == FileType::Symlink {
            let target = self.tree.read_link(&node.path);
            node.target = Some(target.map_err(self.read_error(&node.path))?);
        } else {
            let xattrs = self.tree.xattrs(&node.path);
            node.metadata.xattrs = xattrs.map_err(self.read_error(&node.path))?;
        }
        Ok(())
    }
}

impl FileToRead {
    fn is_known(&self) -> bool {
        self.ahead.get().is_some() || self.copied.get().is_some()
    }

    /// The digest, if it is known without reading the file now.
    fn look_up(&self) -> bool {
        if !self.is_known()
            && let Some(digest) = self.origin.tree.digest(&self.node)
        {
            // Another thread found the same.
            let _ = self.ahead.set(digest);
        }
        self.is_known()
    }

    /// Remembers the digest of a file that was read from `since` on.
    fn learn(&self, file: &File, digest: &Digest, since: Time) {
        let state = self.node.state();
        if self.ahead.get() != Some(digest) && FileState::of(file) == Some(state) {
            self.origin.tree.learn(&state, digest, since);
        }
    }

    fn hash(&self, buffer: &mut [u8]) -> Result<(), CopyError> {
        let since = stat_cache::now();
        let mut hash = || {
            let mut file = self.origin.tree.open(&self.node.path)?;
            let mut hasher = Hasher::new();
            let mut left = self.node.size_bytes;
            loop {
                let read = read_some(&mut file, buffer)?;
                hasher.update(&buffer[..read]);
                left = left.saturating_sub(read as u64);
                // As long as it was, it has ended; longer, it has changed, which shows then.
                if read == 0 || left == 0 {
                    break;
                }
            }
            Ok((file, hasher.finish()))
        };
        let (file, digest) = hash().map_err(self.origin.read_error(&self.node.path))?;
        self.learn(&file, &digest, since);
        let _ = self.ahead.set(digest);
        Ok(())
    }
}

fn read_some(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match file.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

impl Listing {
    /// Begins a new source; what is added from now on is in it.
    pub(super) fn source(&mut self, name: &Path) {
        let source = Source {
            name: name.to_owned(),
            entries: Vec::new(),
        };
        self.sources.push(Listed {
            source,
            files: Vec::new(),
        });
    }

    /// Adds an entry that needs nothing more.
    pub(super) fn entry(&mut self, entry: Entry) {
        if self.sources.is_empty() {
            self.source(Path::new(""));
        }
        if let Some(listed) = self.sources.last_mut() {
            listed.source.entries.push(entry);
        }
    }

    /// Adds a file that is [complete](Origin::complete), as `path` of the current source.
    /// Regular files get a number by which they can be [opened](Listing::open).
    pub(super) fn node(
        &mut self,
        origin: &Origin,
        path: &Path,
        node: &SourceNode,
        role: Role,
    ) -> Result<Option<usize>, CopyError> {
        let kind = match (node.file_type, role) {
            (FileType::RegularFile, Role::Archive) => Kind::Archive(NOTHING.clone()),
            (FileType::RegularFile, _) => Kind::File(NOTHING.clone()),
            (FileType::Directory, _) => Kind::Directory {
                is_parent: role == Role::Parent,
            },
            (FileType::Symlink, _) => Kind::Symlink(node.target.clone().unwrap_or_default().into()),
            (other, _) => {
                Entry::special(other).ok_or_else(|| CopyError::Type(node.path.clone()))?
            }
        };
        let is_file = matches!(kind, Kind::File(_) | Kind::Archive(_));
        let entry = Entry {
            device: node.device,
            time: origin.is_dated.then_some(node.metadata.mtime),
            xattrs: xattrs_digest(&node.metadata.xattrs),
            ..Entry::new(path, kind, &node.metadata)
        };
        self.entry(entry);
        let (true, Some(listed)) = (is_file, self.sources.last_mut()) else {
            return Ok(None);
        };
        let number = self.files.all.len();
        listed.files.push((listed.source.entries.len() - 1, number));
        self.files.all.push(FileToRead {
            origin: origin.clone(),
            node: node.clone(),
            ahead: OnceLock::new(),
            copied: OnceLock::new(),
        });
        Ok(Some(number))
    }

    /// Adds another name of a file that was added to the current source as `first`.
    pub(super) fn hard_link(
        &mut self,
        origin: &Origin,
        path: &Path,
        node: &SourceNode,
        first: &Path,
    ) {
        let kind = Kind::Hardlink(first.to_owned());
        self.entry(Entry {
            time: origin.is_dated.then_some(node.metadata.mtime),
            xattrs: xattrs_digest(&node.metadata.xattrs),
            ..Entry::new(path, kind, &node.metadata)
        });
    }

    /// What is read: with the digests of what was copied, of the stat cache, and else of the
    /// files as they are now, which are hashed on all processors. Blocking.
    pub(super) fn manifest(&self) -> Result<ContentManifest, CopyError> {
        let unknown: Vec<&FileToRead> = self.files.all.iter().filter(|f| !f.look_up()).collect();
        hash_all(&unknown)?;
        let mut sources = Vec::with_capacity(self.sources.len());
        for listed in &self.sources {
            let mut source = listed.source.clone();
            for (entry, file) in &listed.files {
                let (entry, file) = (&mut source.entries[*entry], &self.files.all[*file]);
                let digest = file.copied.get().or(file.ahead.get()).cloned();
                let digest = digest.unwrap_or_else(|| NOTHING.clone());
                entry.kind = match entry.kind {
                    Kind::Archive(_) => Kind::Archive(digest),
                    _ => Kind::File(digest),
                };
            }
            sources.push(source);
        }
        Ok(ContentManifest { sources })
    }

    /// [`Listing::manifest`] of what was copied; `None` where a file changed meanwhile so that
    /// no manifest says what is in the copies.
    pub(super) fn copied(&self) -> Result<Option<ContentManifest>, CopyError> {
        let manifest = self.manifest()?;
        Ok((!self.files.is_torn.load(Ordering::Relaxed)).then_some(manifest))
    }

    /// Hashes copies that were made without [`Listing::open`]: they are what counts. Each is
    /// the path of a copy, and the number of the file that it is of. Blocking.
    pub(super) fn hash_copies(&self, copies: Vec<(usize, PathBuf)>) -> Result<(), CopyError> {
        on_threads(&copies, |(number, path), buffer| {
            let mut hash = || {
                let (mut file, mut hasher) = (File::open(path)?, Hasher::new());
                loop {
                    match read_some(&mut file, buffer)? {
                        0 => return Ok(hasher.finish()),
                        read => hasher.update(&buffer[..read]),
                    }
                }
            };
            let digest = hash().map_err(|source| CopyError::Read {
                path: path.clone(),
                place: "the copy of the context",
                source,
            })?;
            self.set_copied(*number, &digest);
            Ok(())
        })
    }

    /// Says what the bytes in a copy are.
    fn set_copied(&self, number: usize, digest: &Digest) {
        let file = self.files.all.get(number);
        if file.is_none_or(|file| file.copied.get_or_init(|| digest.clone()) != digest) {
            self.files.is_torn.store(true, Ordering::Relaxed);
        }
    }

    /// Opens a file to be copied; what is read is what the manifest will say.
    pub(super) fn open(self: &Arc<Self>, number: usize) -> io::Result<CopiedFile> {
        let since = stat_cache::now();
        let wanted = self.files.all.get(number).ok_or(io::ErrorKind::NotFound)?;
        let mut copied = CopiedFile {
            file: wanted.origin.tree.open(&wanted.node.path)?,
            listing: Arc::clone(self),
            number,
            since,
            hasher: Some(Hasher::new()),
            left_bytes: wanted.node.size_bytes,
        };
        if copied.left_bytes == 0 {
            copied.finish();
        }
        Ok(copied)
    }
}

impl Listing {
    /// Opens a file all of which is read in the end, whatever is needed of it.
    pub(super) fn open_whole(
        self: &Arc<Self>,
        number: Option<usize>,
        node: &SourceNode,
    ) -> Result<WholeFile, CopyError> {
        let number = number.ok_or_else(|| CopyError::Type(node.path.clone()))?;
        let opened = self.open(number).map_err(|source| CopyError::Read {
            path: node.path.clone(),
            place: self
                .files
                .all
                .get(number)
                .map_or("", |file| file.origin.place),
            source,
        });
        opened.map(WholeFile)
    }
}

/// Hashes files on several threads.
fn hash_all(files: &[&FileToRead]) -> Result<(), CopyError> {
    on_threads(files, |file, buffer| file.hash(buffer))
}

/// Does `work` for each of `all`, with a buffer, on several threads.
fn on_threads<T: Sync>(
    all: &[T],
    work: impl Fn(&T, &mut [u8]) -> Result<(), CopyError> + Sync,
) -> Result<(), CopyError> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = processors
        .min(HASHING_THREADS)
        .min(all.len() / FILES_PER_THREAD + 1);
    let (next, failure) = (AtomicUsize::new(0), Mutex::new(None));
    let take = || {
        let mut buffer = vec![0; BUFFER_BYTES];
        while let Some(one) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = work(one, &mut buffer) {
                next.store(all.len(), Ordering::Relaxed);
                let mut failure = failure
                    .lock()
                    .expect("nothing panics while it holds this lock");
                failure.get_or_insert(error);
                return;
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            // Fewer threads do the same.
            let _ = std::thread::Builder::new()
                .name("hash".to_owned())
                .spawn_scoped(scope, take);
        }
        take();
    });
    let failure = failure.into_inner();
    match failure.expect("nothing panics while it holds this lock") {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// A file that is hashed while it is copied.
pub(super) struct CopiedFile {
    file: File,
    listing: Arc<Listing>,
    number: usize,
    /// When it was opened.
    since: Time,
    /// Until all is read.
    hasher: Option<Hasher>,
    left_bytes: u64,
}

impl CopiedFile {
    fn finish(&mut self) {
        let Some(hasher) = self.hasher.take() else {
            return;
        };
        let digest = hasher.finish();
        if let Some(wanted) = self.listing.files.all.get(self.number) {
            wanted.learn(&self.file, &digest, self.since);
        }
        self.listing.set_copied(self.number, &digest);
    }

    fn tear(&self) {
        self.listing.files.is_torn.store(true, Ordering::Relaxed);
    }
}

impl Read for CopiedFile {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buffer)?;
        let wanted = usize::try_from(self.left_bytes).map_or(read, |left| left.min(read));
        if wanted < read {
            // It has become longer than it was when it was listed.
            self.tear();
        }
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&buffer[..wanted]);
            self.left_bytes -= wanted as u64;
            if self.left_bytes == 0 {
                self.finish();
            }
        }
        Ok(read)
    }
}

/// A file all of which is hashed, though perhaps not all of it is used: an archive may end
/// before its file does.
pub(super) struct WholeFile(CopiedFile);

impl Read for WholeFile {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Drop for WholeFile {
    fn drop(&mut self) {
        let rest = io::copy(&mut self.0, &mut io::sink());
        if rest.is_err() || self.0.hasher.is_some() {
            // Nobody knows any more what was read.
            self.0.tear();
        }
    }
}

/// Lets a thread of its own open and read the small files of `changes`, a few files before
/// whoever writes the changes in their order needs them.
///
/// It takes opening, reading and hashing from the thread that writes the archive, which is
/// the one that all others wait for.
pub(super) fn read_ahead(changes: &mut [Change]) {
    let mut small: Vec<(u64, &mut FileSource)> = Vec::new();
    for change in changes {
        if let ChangeKind::Entry(entry) = &mut change.kind
            && let Data::File(content) = &mut entry.data
            && content.size_bytes <= READ_AHEAD_BYTES
            && matches!(content.source, FileSource::Read(_))
        {
            small.push((content.size_bytes, &mut content.source));
        }
    }
    // Below that, a thread costs more than it saves.
    if small.len() < FILES_AHEAD {
        return;
    }
    let mut openers = Vec::with_capacity(small.len());
    let (ahead, slots) = (Arc::new(Ahead::default()), Arc::new(OnceLock::new()));
    for (number, (size_bytes, source)) in small.into_iter().enumerate() {
        let (ahead, openers_of_all) = (Arc::clone(&ahead), Arc::clone(&slots));
        let wait: OpenReader = Box::new(move || {
            let bytes = ahead.take(number, &openers_of_all)?;
            Ok(Box::new(Cursor::new(bytes)) as Box<dyn Read + Send>)
        });
        if let FileSource::Read(open) = std::mem::replace(source, FileSource::Read(wait)) {
            openers.push(Mutex::new(Some((size_bytes, open))));
        }
    }
    // Nothing has asked for it yet.
    let _ = slots.set(openers);
}

/// The files that are read ahead, in order. The thread has a share of these, but not of
/// [`Ahead`]: when nobody wants files any more, its channel closes.
type Openers = OnceLock<Vec<Mutex<Option<(u64, OpenReader)>>>>;

/// Where files that were read ahead arrive, with their numbers. The thread starts when the
/// first is wanted.
#[derive(Default)]
struct Ahead(Mutex<Option<Receiver<Arrived>>>);

/// The number of a file, and its content.
type Arrived = (usize, io::Result<Vec<u8>>);

impl Ahead {
    /// The content of the file `number`; its turn comes after all before it.
    fn take(&self, number: usize, openers: &Arc<Openers>) -> io::Result<Vec<u8>> {
        let mut receiver = self
            .0
            .lock()
            .expect("nothing panics while it holds this lock");
        let receiver = receiver.get_or_insert_with(|| {
            let (sender, receiver) = sync_channel(FILES_AHEAD);
            let openers = Arc::clone(openers);
            let read_all = move || {
                for number in number.. {
                    // The end, or nobody wants more.
                    let Some(content) = read_small(&openers, number) else {
                        return;
                    };
                    if sender.send((number, content)).is_err() {
                        return;
                    }
                }
            };
            // Where no thread can be had, the channel is closed and files are read one by one.
            let _ = std::thread::Builder::new()
                .name("read".to_owned())
                .spawn(read_all);
            receiver
        });
        while let Ok((arrived, content)) = receiver.recv() {
            if arrived == number {
                return content;
            }
        }
        read_small(openers, number)
            .unwrap_or_else(|| Err(io::Error::other("it was read before its turn")))
    }
}

/// Reads the file `number`; `None` where there is none, or it was read.
fn read_small(openers: &Openers, number: usize) -> Option<io::Result<Vec<u8>>> {
    let opener = openers.get()?.get(number)?;
    let (size_bytes, open) = opener
        .lock()
        .expect("nothing panics while it holds this lock")
        .take()?;
    Some(open().and_then(|file| {
        // With room for what shows that it has not become longer; that is found by its first
        // byte too many.
        let capacity = usize::try_from(size_bytes).unwrap_or(0).saturating_add(32);
        let mut bytes = Vec::with_capacity(capacity);
        file.take(READ_AHEAD_BYTES + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    }))
}
