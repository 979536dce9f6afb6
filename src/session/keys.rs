//! Private keys from files: reading them, and signing as an agent does.
//!
//! What is read is what OpenSSH writes: its own format, and the PEM formats that it wrote
//! before 7.8 and still writes with `-m PEM` or `-m PKCS8` (PKCS #1, SEC 1, PKCS #8).

use std::fmt;
use std::io;
use std::path::Path;

use ed25519_dalek::pkcs8::DecodePrivateKey as _;
use getrandom::{SysRng, rand_core::UnwrapErr};
use rsa::pkcs1::DecodeRsaPrivateKey as _;
use rsa::signature::{Error as SignatureError, Signer as _};
use sha2::Digest as _;
use ssh_key::private::{EcdsaKeypair, Ed25519Keypair, KeypairData, PrivateKey, RsaKeypair};
use ssh_key::{Signature, encoding::Encode as _};

use super::protocol::{RSA_SHA2_256, RSA_SHA2_512, put_string};
use super::read_wiped;

/// The largest key file, in bytes: BuildKit's limit. An RSA key of 16384 bits has 13 KiB.
pub(super) const MAX_KEY_BYTES: usize = 100 * 1024;

/// Why a file is no private key that can sign.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// It cannot be read.
    #[error("reading it")]
    Read(#[source] io::Error),
    /// It is far larger than any key.
    #[error("it has more than {MAX_KEY_BYTES} bytes, so it is no private key")]
    TooLarge,
    /// It has no key at all.
    #[error("it is no private key: it has no -----BEGIN … PRIVATE KEY-----")]
    NotAKey,
    /// It is the other half.
    #[error("it is a public key; give the private key, in the file without .pub")]
    Public,
    /// It is PuTTY's format.
    #[error("it is a PuTTY key; convert it with puttygen -O private-openssh")]
    Putty,
    /// It is encrypted.
    #[error(
        "it is encrypted with a passphrase; add it to an agent (ssh-add) \
         and give the agent's socket instead of the file"
    )]
    Encrypted,
    /// The key itself is in a security key.
    #[error(
        "it belongs to a hardware security key, which only an agent can use; \
         add it to one (ssh-add) and give the agent's socket instead of the file"
    )]
    Hardware,
    /// A kind of key that cannot be used.
    #[error("keys of type {0} are not supported; Ed25519, ECDSA and RSA are")]
    Unsupported(String),
    /// It is damaged.
    #[error("the key in it is damaged")]
    Malformed(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl KeyError {
    fn malformed(error: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self::Malformed(Box::new(error))
    }
}

/// A key that can sign. Its parts are wiped from memory when it is dropped.
pub(super) struct Key {
    blob: Vec<u8>,
    signer: Signer,
}

enum Signer {
    /// Kept apart, as its signatures differ by the request's flags.
    Rsa(Box<rsa::RsaPrivateKey>),
    Other(KeypairData),
}

impl Key {
    /// Reads the key in a file.
    ///
    /// # Errors
    /// [`KeyError`] says what the file is instead.
    pub(super) fn read(path: &Path) -> Result<Self, KeyError> {
        let bytes = read_wiped(path, MAX_KEY_BYTES)
            .map_err(KeyError::Read)?
            .ok_or(KeyError::TooLarge)?;
        let text = std::str::from_utf8(&bytes).map_err(|_| KeyError::NotAKey)?;
        Self::parse(text)
    }

    fn parse(text: &str) -> Result<Self, KeyError> {
        let (label, text) = match pem_block(text) {
            Some((label, block)) => (Some(label), block),
            None => (None, text.trim_start()),
        };
        match label {
            Some("OPENSSH PRIVATE KEY") => {
                let key = PrivateKey::from_openssh(text).map_err(KeyError::malformed)?;
                Self::new(key.key_data().clone())
            }
            // The older encryption leaves the label as it is.
            Some(_) if text.contains("\nProc-Type: 4,ENCRYPTED") => Err(KeyError::Encrypted),
            Some("ENCRYPTED PRIVATE KEY") => Err(KeyError::Encrypted),
            Some("RSA PRIVATE KEY") => {
                let key = rsa::RsaPrivateKey::from_pkcs1_pem(text).map_err(KeyError::malformed)?;
                Self::new_rsa(key)
            }
            Some("EC PRIVATE KEY") => Self::new(KeypairData::Ecdsa(sec1(text)?)),
            Some("PRIVATE KEY") => pkcs8(text),
            Some("DSA PRIVATE KEY") => Err(KeyError::Unsupported("ssh-dss".to_owned())),
            Some("PUBLIC KEY" | "RSA PUBLIC KEY" | "SSH2 PUBLIC KEY") => Err(KeyError::Public),
            _ if text.starts_with("PuTTY-User-Key-File-") => Err(KeyError::Putty),
            _ if ["ssh-", "ecdsa-sha2-", "sk-", "---- BEGIN SSH2 PUBLIC KEY"]
                .iter()
                .any(|prefix| text.starts_with(prefix)) =>
            {
                Err(KeyError::Public)
            }
            _ => Err(KeyError::NotAKey),
        }
    }

    fn new(data: KeypairData) -> Result<Self, KeyError> {
        match &data {
            KeypairData::Encrypted(_) => return Err(KeyError::Encrypted),
            KeypairData::SkEcdsaSha2NistP256(_) | KeypairData::SkEd25519(_) => {
                return Err(KeyError::Hardware);
            }
            KeypairData::Rsa(pair) => {
                return Self::new_rsa(pair.try_into().map_err(KeyError::malformed)?);
            }
            KeypairData::Ecdsa(_) | KeypairData::Ed25519(_) => {}
            other => {
                let kind = other.algorithm().map_err(KeyError::malformed)?;
                return Err(KeyError::Unsupported(kind.to_string()));
            }
        }
        // Encoding also shows that the public half is there.
        let public = ssh_key::public::KeyData::try_from(&data).map_err(KeyError::malformed)?;
        let key = Self {
            blob: public.encode_vec().map_err(KeyError::malformed)?,
            signer: Signer::Other(data),
        };
        // A private half that is out of range is found now and not in a step.
        key.sign(b"", 0).map_err(KeyError::malformed)?;
        Ok(key)
    }

    fn new_rsa(key: rsa::RsaPrivateKey) -> Result<Self, KeyError> {
        let pair = RsaKeypair::try_from(&key).map_err(KeyError::malformed)?;
        let public = ssh_key::public::KeyData::Rsa(pair.public().clone());
        Ok(Self {
            blob: public.encode_vec().map_err(KeyError::malformed)?,
            signer: Signer::Rsa(Box::new(key)),
        })
    }

    /// The public key as the protocol has it.
    pub(super) fn blob(&self) -> &[u8] {
        &self.blob
    }

    /// A signature over `data` as the protocol has it. `flags` choose the hash of RSA
    /// signatures; without any it is SHA-1, as the protocol says, which only old servers take.
    ///
    /// # Errors
    /// For flags that are unknown or do not fit the key.
    pub(super) fn sign(&self, data: &[u8], flags: u32) -> Result<Vec<u8>, SignError> {
        match &self.signer {
            Signer::Rsa(key) => sign_rsa(key, data, flags),
            // The flags are about RSA; OpenSSH's agent ignores them for other keys.
            Signer::Other(pair) => {
                let signature: Signature = match pair {
                    KeypairData::Ed25519(pair) => pair.try_sign(data)?,
                    KeypairData::Ecdsa(pair) => pair.try_sign(data)?,
                    _ => return Err(SignError::Refused(SignatureError::new())),
                };
                signature.encode_vec().map_err(|_| SignError::Encoding)
            }
        }
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(…)")
    }
}

/// Why nothing was signed.
#[derive(Debug, thiserror::Error)]
pub(super) enum SignError {
    #[error("flags {0:#x} ask for no signature of an RSA key")]
    Flags(u32),
    #[error("the key cannot sign")]
    Refused(#[from] SignatureError),
    #[error("the RSA key cannot sign")]
    Rsa(#[from] rsa::Error),
    #[error("the signature cannot be encoded")]
    Encoding,
}

fn sign_rsa(key: &rsa::RsaPrivateKey, data: &[u8], flags: u32) -> Result<Vec<u8>, SignError> {
    use rsa::Pkcs1v15Sign;

    // The random numbers blind the operation: a step may measure how long it takes.
    let rng = &mut UnwrapErr(SysRng);
    let (name, signature) = match flags {
        RSA_SHA2_512 => (
            "rsa-sha2-512",
            key.sign_with_rng(
                rng,
                Pkcs1v15Sign::new::<sha2::Sha512>(),
                &sha2::Sha512::digest(data),
            )?,
        ),
        RSA_SHA2_256 => (
            "rsa-sha2-256",
            key.sign_with_rng(
                rng,
                Pkcs1v15Sign::new::<sha2::Sha256>(),
                &sha2::Sha256::digest(data),
            )?,
        ),
        0 => (
            "ssh-rsa",
            key.sign_with_rng(
                rng,
                Pkcs1v15Sign::new::<sha1::Sha1>(),
                &sha1::Sha1::digest(data),
            )?,
        ),
        _ => return Err(SignError::Flags(flags)),
    };
    let mut encoded = Vec::new();
    put_string(&mut encoded, name.as_bytes());
    put_string(&mut encoded, &signature);
    Ok(encoded)
}

/// The label and the text of the first PEM block; what is around it does not count.
fn pem_block(text: &str) -> Option<(&str, &str)> {
    const BEGIN: &str = "-----BEGIN ";
    let start = text
        .match_indices(BEGIN)
        .map(|(at, _)| at)
        .find(|&at| at == 0 || text[..at].ends_with('\n'))?;
    let block = &text[start..];
    let (label, _) = block[BEGIN.len()..].split_once("-----")?;
    let end = format!("-----END {label}-----");
    // Without an end it is given whole, for the decoder to say so.
    let length = block.find(&end).map_or(block.len(), |at| at + end.len());
    Some((label, &block[..length]))
}

/// A key of SEC 1, of whichever curve it names.
fn sec1(text: &str) -> Result<EcdsaKeypair, KeyError> {
    p256::SecretKey::from_sec1_pem(text)
        .map(p256_pair)
        .or_else(|_| p384::SecretKey::from_sec1_pem(text).map(p384_pair))
        .or_else(|_| p521::SecretKey::from_sec1_pem(text).map(p521_pair))
        .map_err(KeyError::malformed)
}

/// A key of PKCS #8, of whichever kind it is.
fn pkcs8(text: &str) -> Result<Key, KeyError> {
    if let Ok(key) = rsa::RsaPrivateKey::from_pkcs8_pem(text) {
        return Key::new_rsa(key);
    }
    let pair = ed25519_dalek::SigningKey::from_pkcs8_pem(text)
        .map(|key| KeypairData::Ed25519(Ed25519Keypair::from(key)))
        .or_else(|_| {
            p256::SecretKey::from_pkcs8_pem(text)
                .map(p256_pair)
                .or_else(|_| p384::SecretKey::from_pkcs8_pem(text).map(p384_pair))
                .or_else(|_| p521::SecretKey::from_pkcs8_pem(text).map(p521_pair))
                .map(KeypairData::Ecdsa)
        })
        .map_err(KeyError::malformed)?;
    Key::new(pair)
}

fn p256_pair(private: p256::SecretKey) -> EcdsaKeypair {
    EcdsaKeypair::NistP256 {
        public: private.public_key().into(),
        private: private.into(),
    }
}

fn p384_pair(private: p384::SecretKey) -> EcdsaKeypair {
    EcdsaKeypair::NistP384 {
        public: private.public_key().into(),
        private: private.into(),
    }
}

fn p521_pair(private: p521::SecretKey) -> EcdsaKeypair {
    EcdsaKeypair::NistP521 {
        public: private.public_key().into(),
        private: private.into(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use rsa::signature::Verifier as _;
    use ssh_key::{Algorithm, EcdsaCurve, LineEnding, PublicKey};

    use super::super::protocol::string;
    use super::super::testing::chain;
    use super::*;

    /// A new key in OpenSSH's format, and its public half.
    pub(in super::super) fn generate(algorithm: Algorithm) -> (String, PublicKey) {
        let key = PrivateKey::random(&mut UnwrapErr(SysRng), algorithm).unwrap();
        let text = key.to_openssh(LineEnding::LF).unwrap();
        (text.to_string(), key.public_key().clone())
    }

    /// Whether `signature` is one by `public` over `data`.
    pub(in super::super) fn verifies(public: &PublicKey, data: &[u8], signature: &[u8]) -> bool {
        let signature = Signature::try_from(signature).unwrap();
        public.key_data().verify(data, &signature).is_ok()
    }

    #[test]
    fn every_kind_of_key_signs() {
        for algorithm in [
            Algorithm::Ed25519,
            Algorithm::Ecdsa {
                curve: EcdsaCurve::NistP256,
            },
            Algorithm::Ecdsa {
                curve: EcdsaCurve::NistP384,
            },
            Algorithm::Ecdsa {
                curve: EcdsaCurve::NistP521,
            },
        ] {
            let (text, public) = generate(algorithm);
            let key = Key::parse(&text).unwrap();
            assert_eq!(key.blob(), public.to_bytes().unwrap());
            let signature = key.sign(b"data", 0).unwrap();
            assert!(verifies(&public, b"data", &signature));
            assert!(!verifies(&public, b"Data", &signature));
            assert_eq!(format!("{key:?}"), "Key(…)");
        }
    }

    /// An RSA key of 1024 bits, which is quick to make; keys in use have more.
    fn rsa_key() -> rsa::RsaPrivateKey {
        rsa::RsaPrivateKey::new(&mut UnwrapErr(SysRng), 1024).unwrap()
    }

    #[test]
    fn flags_choose_the_hash_of_rsa_signatures() {
        use rsa::Pkcs1v15Sign;

        let private = rsa_key();
        let public = private.to_public_key();
        let key = Key::new_rsa(private).unwrap();
        let check = |flags: u32, name: &[u8], scheme: Pkcs1v15Sign, hash: &[u8]| {
            let signature = key.sign(b"data", flags).unwrap();
            let (signed_with, rest) = string(&signature).unwrap();
            assert_eq!(signed_with, name);
            let (signature, rest) = string(rest).unwrap();
            assert_eq!(rest, b"");
            public.verify(scheme, hash, signature).unwrap();
        };
        let sha1 = sha1::Sha1::digest(b"data");
        check(0, b"ssh-rsa", Pkcs1v15Sign::new::<sha1::Sha1>(), &sha1);
        let sha256 = sha2::Sha256::digest(b"data");
        check(
            2,
            b"rsa-sha2-256",
            Pkcs1v15Sign::new::<sha2::Sha256>(),
            &sha256,
        );
        let sha512 = sha2::Sha512::digest(b"data");
        check(
            4,
            b"rsa-sha2-512",
            Pkcs1v15Sign::new::<sha2::Sha512>(),
            &sha512,
        );
        for flags in [1, 6, 8] {
            let error = key.sign(b"data", flags).unwrap_err().to_string();
            assert_eq!(
                error,
                format!("flags {flags:#x} ask for no signature of an RSA key")
            );
        }
    }

    #[test]
    fn older_formats_hold_the_same_keys() {
        use ed25519_dalek::pkcs8::EncodePrivateKey as _;
        use rsa::pkcs1::EncodeRsaPrivateKey as _;

        let check = |text: &str, public: ssh_key::public::KeyData| {
            let key = Key::parse(text).unwrap();
            assert_eq!(key.blob(), public.encode_vec().unwrap(), "{text}");
        };
        let end = LineEnding::LF;
        let key = rsa_key();
        let pair = KeypairData::Rsa(RsaKeypair::try_from(&key).unwrap());
        let public = ssh_key::public::KeyData::try_from(&pair).unwrap();
        check(&key.to_pkcs1_pem(end).unwrap(), public.clone());
        check(&key.to_pkcs8_pem(end).unwrap(), public.clone());
        let openssh = PrivateKey::try_from(pair).unwrap().to_openssh(end).unwrap();
        check(&openssh, public);

        let key = ed25519_dalek::SigningKey::from_bytes(&[7; 32]);
        let public = ssh_key::public::KeyData::Ed25519(key.verifying_key().into());
        check(&key.to_pkcs8_pem(end).unwrap(), public);

        macro_rules! curve {
            ($curve:ident, $pair:ident, $size:literal) => {
                let key = $curve::SecretKey::from_slice(&[1; $size]).unwrap();
                let pair = KeypairData::Ecdsa($pair(key.clone()));
                let public = ssh_key::public::KeyData::try_from(&pair).unwrap();
                check(&key.to_pkcs8_pem(end).unwrap(), public.clone());
                check(&key.to_sec1_pem(end).unwrap(), public);
            };
        }
        curve!(p256, p256_pair, 32);
        curve!(p384, p384_pair, 48);
        let key = p521::SecretKey::from_slice(&[&[0][..], &[1; 65]].concat()).unwrap();
        let pair = KeypairData::Ecdsa(p521_pair(key.clone()));
        let public = ssh_key::public::KeyData::try_from(&pair).unwrap();
        check(&key.to_pkcs8_pem(end).unwrap(), public.clone());
        check(&key.to_sec1_pem(end).unwrap(), public);
    }

    #[test]
    fn what_is_no_key_is_named() {
        let check = |text: &str, expected: &str| {
            assert_eq!(chain(&Key::parse(text).unwrap_err()), expected, "{text}");
        };
        let not_a_key = "it is no private key: it has no -----BEGIN … PRIVATE KEY-----";
        check("", not_a_key);
        check("-----BEGIN CERTIFICATE-----\n", not_a_key);
        let public = "it is a public key; give the private key, in the file without .pub";
        let (private, key) = generate(Algorithm::Ed25519);
        check(&key.to_openssh().unwrap(), public);
        check("-----BEGIN PUBLIC KEY-----\n", public);
        check(
            "PuTTY-User-Key-File-3: ssh-ed25519\n",
            "it is a PuTTY key; convert it with puttygen -O private-openssh",
        );
        let encrypted = "it is encrypted with a passphrase; add it to an agent (ssh-add) \
                         and give the agent's socket instead of the file";
        check("-----BEGIN ENCRYPTED PRIVATE KEY-----\n", encrypted);
        check(
            "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: x\n",
            encrypted,
        );
        check(
            "-----BEGIN DSA PRIVATE KEY-----\n",
            "keys of type ssh-dss are not supported; Ed25519, ECDSA and RSA are",
        );
        check("-----BEGIN ", not_a_key);
        check("x -----BEGIN RSA PRIVATE KEY-----\n", not_a_key);
        let half = &private[..private.len() / 2];
        let error = Key::parse(half).unwrap_err();
        assert!(matches!(error, KeyError::Malformed(_)), "{error:?}");
        for label in ["RSA ", "EC ", ""] {
            let text = format!(
                "-----BEGIN {label}PRIVATE KEY-----\nAAAA\n-----END {label}PRIVATE KEY-----\n"
            );
            let error = Key::parse(&text).unwrap_err();
            assert!(matches!(error, KeyError::Malformed(_)), "{error:?}");
        }
    }

    #[test]
    fn a_key_in_hardware_needs_an_agent() {
        let (_, public) = generate(Algorithm::Ed25519);
        let public = *public.key_data().ed25519().unwrap();
        let public = ssh_key::public::SkEd25519::from(public);
        let handle = ssh_key::private::SkEd25519::new(public, 1, b"handle".to_vec()).unwrap();
        let text = PrivateKey::from(handle).to_openssh(LineEnding::LF).unwrap();
        assert_eq!(
            Key::parse(&text).unwrap_err().to_string(),
            "it belongs to a hardware security key, which only an agent can use; \
             add it to one (ssh-add) and give the agent's socket instead of the file"
        );
    }

    #[test]
    fn a_file_larger_than_any_key_is_not_read_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let (mut text, _) = generate(Algorithm::Ed25519);
        text.insert_str(0, "a comment\n");
        text.push_str(&"\n".repeat(MAX_KEY_BYTES - text.len()));
        std::fs::write(&path, &text).unwrap();
        assert!(Key::read(&path).is_ok());
        text.push('\n');
        std::fs::write(&path, &text).unwrap();
        let error = Key::read(&path).unwrap_err();
        assert!(matches!(error, KeyError::TooLarge), "{error:?}");
    }
}
