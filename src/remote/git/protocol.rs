//! What is said to a git server: which references are there, and give me this commit.
//!
//! Version 2 of the protocol, and version 0 with servers that know no other. Nothing is ever
//! negotiated, because nothing is there yet: one want, and the pack.
//!
//! <https://git-scm.com/docs/gitprotocol-v2>, <https://git-scm.com/docs/gitprotocol-pack>

use std::io::Read;

use gix_hash::ObjectId;

use super::error::GitError;
use super::http::Http;
use super::packet::{PackReader, Packet, Packets, put};
use super::stream::Stream;
use super::watch::Watch;

const AGENT: &str = concat!("agent=sockless/", env!("CARGO_PKG_VERSION"));
/// The most that is read of a list of references, in bytes; a million have 70 MB.
const REFERENCES_LIMIT_BYTES: u64 = 256 << 20;

/// How a server is reached.
pub(super) enum Connection<'o> {
    Http(Box<Http<'o>>),
    Stream(Stream<'o>),
}

impl Connection<'_> {
    fn send(&mut self, bytes: Vec<u8>) -> Result<(), GitError> {
        match self {
            Self::Http(http) => http.send(bytes),
            Self::Stream(stream) => stream.send(&bytes),
        }
    }

    fn reader(&mut self) -> &mut dyn Read {
        match self {
            Self::Http(http) => http.reader(),
            Self::Stream(stream) => stream.reader(),
        }
    }

    fn explained(&mut self, error: GitError) -> GitError {
        match self {
            Self::Http(_) => error,
            Self::Stream(stream) => stream.explained(error),
        }
    }
}

/// A reference that a server has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reference {
    /// Its full name, such as `refs/heads/main`, or `HEAD`.
    pub(super) name: String,
    /// What it names: a commit, or an annotated tag.
    pub(super) id: ObjectId,
    /// What an annotated tag names in the end.
    pub(super) peeled: Option<ObjectId>,
    /// The name of the reference that it stands for.
    pub(super) target: Option<String>,
}

enum Version {
    /// Capabilities only.
    Two {
        /// Whether less than the whole history can be asked for.
        shallow: bool,
    },
    /// Everything is told in the beginning.
    Zero {
        references: Vec<Reference>,
        shallow: bool,
        side_band: bool,
        /// Whether commits can be asked for that no reference names.
        any_commit: bool,
    },
}

/// A server that told what it can.
pub(super) struct Server<'o> {
    connection: Connection<'o>,
    version: Version,
    /// The hash function of its object names.
    pub(super) hash: gix_hash::Kind,
    remote: String,
    watch: &'o Watch,
}

impl<'o> Server<'o> {
    /// Greets the server.
    ///
    /// # Errors
    /// [`GitError`] of every kind that speaks of connections and answers.
    pub(super) fn greet(
        mut connection: Connection<'o>,
        remote: String,
        watch: &'o Watch,
    ) -> Result<Self, GitError> {
        let is_http = match &mut connection {
            Connection::Http(http) => {
                http.greet()?;
                true
            }
            Connection::Stream(_) => false,
        };
        let mut packets = Packets::new(connection.reader(), &remote, watch, REFERENCES_LIMIT_BYTES);
        match greeting(&mut packets, is_http) {
            Ok((version, hash)) => Ok(Self {
                connection,
                version,
                hash,
                remote,
                watch,
            }),
            Err(error) => Err(connection.explained(error)),
        }
    }

    /// The references whose names begin with one of `prefixes`. An old server tells of all.
    ///
    /// # Errors
    /// As [`Self::greet`].
    pub(super) fn references(&mut self, prefixes: &[String]) -> Result<Vec<Reference>, GitError> {
        if let Version::Zero { references, .. } = &self.version {
            return Ok(references.clone());
        }
        let mut request = Vec::new();
        put(&mut request, b"command=ls-refs\n");
        self.put_capabilities(&mut request);
        request.extend_from_slice(b"0001");
        put(&mut request, b"peel\n");
        put(&mut request, b"symrefs\n");
        for prefix in prefixes {
            // A longer name is none of a reference, and does not fit into a packet.
            if prefix.len() < 4096 {
                put(&mut request, format!("ref-prefix {prefix}\n").as_bytes());
            }
        }
        request.extend_from_slice(b"0000");
        self.connection.send(request)?;
        let mut packets = Packets::new(
            self.connection.reader(),
            &self.remote,
            self.watch,
            REFERENCES_LIMIT_BYTES,
        );
        let mut references = Vec::new();
        while let Some(line) = packets.line()? {
            let line = String::from_utf8_lossy(&line).into_owned();
            let mut words = line.split(' ');
            let (Some(id), Some(name)) = (words.next(), words.next()) else {
                return Err(packets.protocol("a line of the list of references is incomplete"));
            };
            // `unborn` is not asked for.
            let id = parse_id(id, self.hash).ok_or_else(|| packets.protocol("that is no hash"))?;
            let mut reference = Reference {
                name: name.to_owned(),
                id,
                peeled: None,
                target: None,
            };
            for word in words {
                if let Some(target) = word.strip_prefix("symref-target:") {
                    reference.target = Some(target.to_owned());
                } else if let Some(id) = word.strip_prefix("peeled:") {
                    reference.peeled = parse_id(id, self.hash);
                }
            }
            references.push(reference);
        }
        Ok(references)
    }

    /// Whether it is worth asking for a commit that no reference names.
    pub(super) fn gives_any_commit(&self) -> bool {
        match &self.version {
            Version::Two { .. } => true,
            Version::Zero { any_commit, .. } => *any_commit,
        }
    }

    /// Asks for a pack with `wants` and all they need; of their history only themselves where
    /// `alone` is set and the server can do so. `consume` reads it.
    ///
    /// # Errors
    /// [`GitError::Server`] where it has no such object or does not give it; what `consume`
    /// returns; and as [`Self::greet`].
    pub(super) fn pack<T>(
        &mut self,
        wants: &[ObjectId],
        alone: bool,
        limit_bytes: u64,
        consume: impl FnOnce(&mut PackReader<'_, '_>) -> Result<T, GitError>,
    ) -> Result<T, GitError> {
        let mut request = Vec::new();
        let (Version::Two { shallow } | Version::Zero { shallow, .. }) = &self.version;
        let deepen = alone && *shallow;
        match &self.version {
            Version::Two { .. } => {
                put(&mut request, b"command=fetch\n");
                self.put_capabilities(&mut request);
                request.extend_from_slice(b"0001");
                put(&mut request, b"ofs-delta\n");
                for want in wants {
                    put(&mut request, format!("want {want}\n").as_bytes());
                }
                if deepen {
                    put(&mut request, b"deepen 1\n");
                }
                put(&mut request, b"done\n");
                request.extend_from_slice(b"0000");
            }
            Version::Zero { side_band, .. } => {
                if !side_band {
                    return Err(GitError::Protocol {
                        remote: self.remote.clone(),
                        reason: "the server is too old: it does not know side-band-64k".to_owned(),
                    });
                }
                let mut capabilities = format!(" side-band-64k ofs-delta no-progress {AGENT}");
                if self.hash != gix_hash::Kind::Sha1 {
                    capabilities.push_str(&format!(" object-format={}", self.hash));
                }
                for want in wants {
                    put(
                        &mut request,
                        format!("want {want}{capabilities}\n").as_bytes(),
                    );
                    capabilities.clear();
                }
                if deepen {
                    put(&mut request, b"deepen 1\n");
                }
                request.extend_from_slice(b"0000");
                put(&mut request, b"done\n");
            }
        }
        self.connection.send(request)?;
        let result = {
            let mut packets = Packets::new(
                self.connection.reader(),
                &self.remote,
                self.watch,
                // What is around the pack: five bytes for each 64 KiB at best, and messages.
                limit_bytes
                    .saturating_add(limit_bytes / 64)
                    .saturating_add(1 << 20),
            );
            let begun = match self.version {
                Version::Two { .. } => until_pack(&mut packets),
                Version::Zero { .. } => until_nak(&mut packets, deepen),
            };
            begun.and_then(|()| {
                let mut pack = PackReader::new(&mut packets);
                let consumed = consume(&mut pack);
                match pack.failure.take() {
                    Some(failure) => Err(failure),
                    None => consumed,
                }
            })
        };
        result.map_err(|error| self.connection.explained(error))
    }

    fn put_capabilities(&self, request: &mut Vec<u8>) {
        put(request, format!("{AGENT}\n").as_bytes());
        put(request, format!("object-format={}\n", self.hash).as_bytes());
    }
}

/// Reads the greeting of either version.
fn greeting(
    packets: &mut Packets<'_>,
    is_http: bool,
) -> Result<(Version, gix_hash::Kind), GitError> {
    let mut first = packets.line()?;
    if is_http && first.as_deref().is_some_and(|line| line.starts_with(b"# ")) {
        // `# service=git-upload-pack`, and a flush after it.
        if packets.line()?.is_some() {
            return Err(packets.protocol("the service's name is not followed by a flush"));
        }
        first = packets.line()?;
    }
    if first.as_deref() == Some(b"version 1") {
        first = packets.line()?;
    }
    if first.as_deref() == Some(b"version 2") {
        let mut capabilities = Vec::new();
        while let Some(line) = packets.line()? {
            capabilities.push(String::from_utf8_lossy(&line).into_owned());
        }
        let value = |name: &str| {
            capabilities.iter().find_map(|line| {
                let (key, value) = line.split_once('=').unwrap_or((line, ""));
                (key == name).then_some(value)
            })
        };
        let Some(fetch) = value("fetch") else {
            return Err(packets.protocol("the server offers no fetch"));
        };
        let hash = hash_kind(packets, value("object-format"))?;
        let shallow = fetch.split(' ').any(|feature| feature == "shallow");
        return Ok((Version::Two { shallow }, hash));
    }
    let Some(mut line) = first else {
        return Err(packets.protocol("the server's greeting is empty"));
    };
    let mut capabilities = Vec::new();
    if let Some(at) = line.iter().position(|byte| *byte == 0) {
        capabilities = line.split_off(at + 1);
        line.truncate(at);
    }
    let capabilities = String::from_utf8_lossy(&capabilities).into_owned();
    let has = |name: &str| capabilities.split(' ').any(|word| word == name);
    let format = capabilities
        .split(' ')
        .find_map(|word| word.strip_prefix("object-format="));
    let hash = hash_kind(packets, format)?;
    let mut references: Vec<Reference> = Vec::new();
    let mut next = Some(line);
    while let Some(line) = next {
        let line = String::from_utf8_lossy(&line).into_owned();
        let Some((id, name)) = line.split_once(' ') else {
            return Err(packets.protocol(format!(
                "the answer is not git's protocol: it begins with {:?}",
                super::error::shown(line.as_bytes())
            )));
        };
        if id != "shallow" && name != "capabilities^{}" {
            let id = parse_id(id, hash).ok_or_else(|| packets.protocol("that is no hash"))?;
            match (name.strip_suffix("^{}"), references.last_mut()) {
                (Some(name), Some(last)) if last.name == name => last.peeled = Some(id),
                _ => references.push(Reference {
                    name: name.to_owned(),
                    id,
                    peeled: None,
                    target: None,
                }),
            }
        }
        next = packets.line()?;
    }
    for word in capabilities.split(' ') {
        if let Some((name, target)) = word
            .strip_prefix("symref=")
            .and_then(|pair| pair.split_once(':'))
            && let Some(found) = references.iter_mut().find(|r| r.name == name)
        {
            found.target = Some(target.to_owned());
        }
    }
    let version = Version::Zero {
        references,
        shallow: has("shallow"),
        side_band: has("side-band-64k"),
        any_commit: has("allow-reachable-sha1-in-want") || has("allow-any-sha1-in-want"),
    };
    Ok((version, hash))
}

fn hash_kind(packets: &Packets<'_>, name: Option<&str>) -> Result<gix_hash::Kind, GitError> {
    match name {
        None | Some("sha1") => Ok(gix_hash::Kind::Sha1),
        Some("sha256") => Ok(gix_hash::Kind::Sha256),
        Some(other) => Err(packets.protocol(format!(
            "its objects are named by {other:?}, which is not known; sha1 and sha256 are"
        ))),
    }
}

pub(super) fn parse_id(text: &str, hash: gix_hash::Kind) -> Option<ObjectId> {
    ObjectId::from_hex(text.as_bytes())
        .ok()
        .filter(|id| id.kind() == hash)
}

/// Reads the sections before the pack.
fn until_pack(packets: &mut Packets<'_>) -> Result<(), GitError> {
    loop {
        match packets.next()? {
            Packet::Data(line) if line.starts_with(b"packfile") => return Ok(()),
            Packet::Data(_) | Packet::Delimiter => {}
            Packet::Flush | Packet::End => {
                return Err(packets.protocol("the server sends no pack"));
            }
        }
    }
}

/// Reads what precedes the pack in the old protocol: the shallow commits, and `NAK`.
fn until_nak(packets: &mut Packets<'_>, deepen: bool) -> Result<(), GitError> {
    if deepen {
        while packets.line()?.is_some() {}
    }
    match packets.line()? {
        Some(line) if line == b"NAK" => Ok(()),
        _ => Err(packets.protocol("the server sends no pack")),
    }
}
