//! A reader of tar archives that depends on no tar library: ustar, PAX and GNU long names.
//!
//! It is strict, because what it reads was written by the program under test.
//!
//! <https://pubs.opengroup.org/onlinepubs/9799919799/utilities/pax.html>

use std::collections::BTreeMap;
use std::io::{self, Read};

/// One entry of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// As written, without `./` before and `/` behind.
    pub path: String,
    /// The type flag: `0` file, `1` hard link, `2` symbolic link, `5` directory, ….
    pub kind: char,
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    pub size: u64,
    /// Whole seconds.
    pub mtime: i64,
    pub link: String,
    /// Major and minor number of a device.
    pub device: (u64, u64),
    /// PAX records that are nothing of the above, such as `SCHILY.xattr.…`.
    pub extensions: BTreeMap<String, Vec<u8>>,
    /// SHA-256 of the content, in hexadecimal.
    pub sha256: String,
    /// The content itself, where it has at most [`SHORT`] bytes.
    pub short: Vec<u8>,
}

/// The size up to which content is kept, so that a difference can be shown.
pub const SHORT: u64 = 2000;

impl Entry {
    /// `MODE UID:GID KIND`, with the mode in octal.
    pub fn summary(&self) -> String {
        format!("{:o} {}:{} {}", self.mode, self.uid, self.gid, self.kind)
    }
}

/// Lists an archive to its very end.
///
/// # Errors
/// What is wrong with the archive.
pub fn list(mut archive: impl Read) -> Result<Vec<Entry>, String> {
    let mut entries = Vec::new();
    let mut pax: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    loop {
        let mut header = [0u8; 512];
        archive
            .read_exact(&mut header)
            .map_err(|e| format!("header: {e}"))?;
        if header == [0; 512] {
            let mut rest = Vec::new();
            archive
                .read_to_end(&mut rest)
                .map_err(|e| format!("end: {e}"))?;
            if rest.len() < 512 || rest.iter().any(|b| *b != 0) {
                return Err("the archive does not end with two blocks of zeros".into());
            }
            return Ok(entries);
        }
        let sum: u64 = header
            .iter()
            .enumerate()
            .map(|(at, byte)| {
                if (148..156).contains(&at) {
                    32
                } else {
                    u64::from(*byte)
                }
            })
            .sum();
        if sum != number(&header[148..156])? {
            return Err(format!("wrong checksum at {:?}", text(&header[..100])));
        }
        let kind = header[156] as char;
        let size = match pax.remove("size") {
            Some(size) => parse(&size)?,
            None => number(&header[124..136])?,
        };
        match kind {
            'x' | 'g' | 'L' | 'K' => {
                let content = read(&mut archive, size, size <= 1 << 20)?;
                match kind {
                    'x' => pax.extend(records(&content)?),
                    'L' => drop(pax.insert("path".into(), text(&content).into_bytes())),
                    'K' => drop(pax.insert("linkpath".into(), text(&content).into_bytes())),
                    _ => return Err("a global header has no place in a layer".into()),
                }
                continue;
            }
            _ => {}
        }
        let mut utf8 = |key: &str| -> Result<Option<String>, String> {
            pax.remove(key)
                .map(|v| String::from_utf8(v).map_err(|e| format!("{key}: {e}")))
                .transpose()
        };
        let path = utf8("path")?.unwrap_or_else(|| {
            let (name, prefix) = (text(&header[..100]), text(&header[345..500]));
            if prefix.is_empty() || &header[257..263] != b"ustar\0" {
                name
            } else {
                format!("{prefix}/{name}")
            }
        });
        let link = utf8("linkpath")?.unwrap_or_else(|| text(&header[157..257]));
        let mtime = match utf8("mtime")? {
            Some(time) => time
                .split('.')
                .next()
                .and_then(|s| s.parse().ok())
                .ok_or_else(|| format!("mtime {time:?}"))?,
            None => number(&header[136..148])?.try_into().map_err(|_| "mtime")?,
        };
        let uid = match utf8("uid")? {
            Some(id) => parse(id.as_bytes())?,
            None => number(&header[108..116])?,
        };
        let gid = match utf8("gid")? {
            Some(id) => parse(id.as_bytes())?,
            None => number(&header[116..124])?,
        };
        let content = Hashed::read(&mut archive, size)?;
        entries.push(Entry {
            path: path
                .trim_start_matches("./")
                .trim_end_matches('/')
                .to_owned(),
            kind: if kind == '\0' { '0' } else { kind },
            mode: u32::try_from(number(&header[100..108])?).map_err(|e| e.to_string())? & 0o7777,
            uid,
            gid,
            size,
            mtime,
            link,
            device: if matches!(kind, '3' | '4') {
                (number(&header[329..337])?, number(&header[337..345])?)
            } else {
                (0, 0)
            },
            extensions: std::mem::take(&mut pax),
            sha256: content.sha256,
            short: content.short,
        });
    }
}

struct Hashed {
    sha256: String,
    short: Vec<u8>,
}

impl Hashed {
    fn read(archive: &mut impl Read, size: u64) -> Result<Self, String> {
        use sha2::{Digest as _, Sha256};
        let mut hasher = Sha256::new();
        let mut short = Vec::new();
        let mut left = size;
        let mut buffer = vec![0; 64 * 1024];
        while left > 0 {
            let want = usize::try_from(left)
                .unwrap_or(usize::MAX)
                .min(buffer.len());
            let got = archive
                .read(&mut buffer[..want])
                .map_err(|e| e.to_string())?;
            if got == 0 {
                return Err(format!("ends {left} bytes before the end of an entry"));
            }
            hasher.update(&buffer[..got]);
            if size <= SHORT {
                short.extend_from_slice(&buffer[..got]);
            }
            left -= got as u64;
        }
        padding(archive, size)?;
        Ok(Self {
            sha256: super::oci::hex(&hasher.finalize()),
            short,
        })
    }
}

fn read(archive: &mut impl Read, size: u64, allowed: bool) -> Result<Vec<u8>, String> {
    if !allowed {
        return Err(format!("a header of {size} bytes"));
    }
    let mut content = Vec::new();
    archive
        .by_ref()
        .take(size)
        .read_to_end(&mut content)
        .map_err(|e| e.to_string())?;
    if content.len() as u64 != size {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).to_string());
    }
    padding(archive, size)?;
    Ok(content)
}

fn padding(archive: &mut impl Read, size: u64) -> Result<(), String> {
    let mut pad = vec![0; (512 - size % 512) as usize % 512];
    archive
        .read_exact(&mut pad)
        .map_err(|e| format!("padding: {e}"))
}

/// `LENGTH KEY=VALUE\n`, by length: values may hold line ends.
fn records(mut content: &[u8]) -> Result<BTreeMap<String, Vec<u8>>, String> {
    let mut records = BTreeMap::new();
    while !content.is_empty() {
        let space = content
            .iter()
            .position(|b| *b == b' ')
            .ok_or("no space in a PAX record")?;
        let length = usize::try_from(parse(&content[..space])?).map_err(|e| e.to_string())?;
        let record = content
            .get(space + 1..length)
            .ok_or("a PAX record's length")?;
        let record = record
            .strip_suffix(b"\n")
            .ok_or("a PAX record without its end")?;
        let equals = record
            .iter()
            .position(|b| *b == b'=')
            .ok_or("a PAX record without =")?;
        records.insert(text(&record[..equals]), record[equals + 1..].to_vec());
        content = &content[length..];
    }
    Ok(records)
}

fn text(field: &[u8]) -> String {
    let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).into_owned()
}

fn parse(digits: &[u8]) -> Result<u64, String> {
    let digits = String::from_utf8_lossy(digits);
    digits.parse().map_err(|e| format!("{digits:?}: {e}"))
}

/// Octal digits, or GNU's base-256 with the first bit set.
fn number(field: &[u8]) -> Result<u64, String> {
    if field[0] & 0x80 != 0 {
        return Ok(field[1..].iter().fold(0, |n, b| n << 8 | u64::from(*b)));
    }
    let digits = text(field);
    let digits = digits.trim();
    if digits.is_empty() {
        return Ok(0);
    }
    u64::from_str_radix(digits, 8).map_err(|e| format!("{digits:?}: {e}"))
}
