//! [`Digest`] and [`DiffId`]: two kinds of SHA-256 that must not be confused.

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use thiserror::Error;

/// The digest of stored bytes: `sha256:` and 64 lower-case hexadecimal digits.
///
/// Built only by hashing or by validation.
///
/// <https://github.com/opencontainers/image-spec/blob/main/descriptor.md#digests>
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

/// The digest of a layer's uncompressed tar, as `rootfs.diff_ids` of an image config lists it.
///
/// <https://github.com/opencontainers/image-spec/blob/main/config.md#layer-diffid>
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DiffId(Digest);

/// Why a text is no [`Digest`].
#[derive(Debug, Error, PartialEq, Eq)]
pub enum DigestError {
    /// Only SHA-256 is supported.
    #[error("unsupported digest {0:?}: expected \"sha256:\" and 64 lower-case hexadecimal digits")]
    Malformed(String),
}

impl Digest {
    /// Hashes `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        let mut hasher = Hasher::new();
        hasher.update(bytes);
        hasher.finish()
    }

    /// Validates `text`.
    ///
    /// # Errors
    /// [`DigestError::Malformed`] for anything but a lower-case SHA-256.
    pub fn parse(text: &str) -> Result<Self, DigestError> {
        let hex = text.strip_prefix("sha256:").unwrap_or_default();
        let valid = hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        valid
            .then(|| Self(text.to_owned()))
            .ok_or_else(|| DigestError::Malformed(text.to_owned()))
    }

    /// The digest whose 32 bytes these are.
    pub fn from_bytes(bytes: &[u8; 32]) -> Self {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut text = String::with_capacity(71);
        text.push_str("sha256:");
        for byte in bytes {
            text.push(char::from(DIGITS[usize::from(byte >> 4)]));
            text.push(char::from(DIGITS[usize::from(byte & 15)]));
        }
        Self(text)
    }

    /// The 32 bytes.
    pub fn to_bytes(&self) -> [u8; 32] {
        let mut bytes = [0; 32];
        let (digits, _) = self.hex().as_bytes().as_chunks::<2>();
        let value = |digit: u8| match digit {
            b'0'..=b'9' => digit - b'0',
            _ => digit - b'a' + 10,
        };
        for (byte, [high, low]) in bytes.iter_mut().zip(digits) {
            *byte = value(*high) << 4 | value(*low);
        }
        bytes
    }

    /// The whole text, `sha256:…`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The 64 digits without the algorithm.
    pub fn hex(&self) -> &str {
        &self.0["sha256:".len()..]
    }

    /// The first twelve digits, for people.
    pub fn short(&self) -> &str {
        &self.hex()[..12]
    }
}

impl DiffId {
    /// Declares that `digest` was computed over an uncompressed layer tar.
    pub fn from_uncompressed(digest: Digest) -> Self {
        Self(digest)
    }

    /// The digest of the uncompressed tar.
    pub fn digest(&self) -> &Digest {
        &self.0
    }
}

/// The chain ID of a stack of layers: one name for what they are together.
///
/// Empty for an empty stack.
///
/// <https://github.com/opencontainers/image-spec/blob/main/config.md#layer-chainid>
pub fn chain_id(diff_ids: &[DiffId]) -> Option<Digest> {
    let (first, rest) = diff_ids.split_first()?;
    Some(rest.iter().fold(first.digest().clone(), |chain, diff_id| {
        Digest::of(format!("{chain} {diff_id}").as_bytes())
    }))
}

impl TryFrom<String> for Digest {
    type Error = DigestError;

    fn try_from(text: String) -> Result<Self, DigestError> {
        Self::parse(&text)
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for DiffId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for DiffId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DiffId({})", self.0)
    }
}

/// A SHA-256 in the making.
#[derive(Clone, Debug, Default)]
pub struct Hasher(Sha256);

impl Hasher {
    /// Starts with no bytes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `bytes`.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of all bytes added.
    pub fn finish(self) -> Digest {
        Digest::from_bytes(&self.0.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn digests_are_validated() {
        assert_eq!(Digest::of(b"").as_str(), EMPTY);
        assert_eq!(Digest::of(b"").to_bytes()[..3], [0xe3, 0xb0, 0xc4]);
        let digest = Digest::of(b"a");
        assert_eq!(Digest::from_bytes(&digest.to_bytes()), digest);
        assert_eq!(Digest::parse(EMPTY).unwrap().short(), "e3b0c44298fc");
        for bad in [
            "",
            "sha256:",
            "sha512:00",
            &EMPTY[7..],
            &EMPTY.to_uppercase(),
            &EMPTY[..70],
        ] {
            assert_eq!(
                Digest::parse(bad),
                Err(DigestError::Malformed(bad.to_owned()))
            );
        }
    }

    #[test]
    fn a_chain_id_names_the_stack_and_its_order() {
        let a = DiffId::from_uncompressed(Digest::of(b"a"));
        let b = DiffId::from_uncompressed(Digest::of(b"b"));
        assert_eq!(chain_id(&[]), None);
        assert_eq!(chain_id(std::slice::from_ref(&a)), Some(a.digest().clone()));
        let both = Digest::of(format!("{a} {b}").as_bytes());
        assert_eq!(chain_id(&[a.clone(), b.clone()]), Some(both));
        assert_ne!(chain_id(&[a.clone(), b.clone()]), chain_id(&[b, a]));
    }
}
