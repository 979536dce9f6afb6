//! The SSH agent's messages: framing, the few requests that are looked into, their answers.
//!
//! A message is a 32-bit length and that many bytes, the first of which is its type; a
//! string is a 32-bit length and that many bytes. All numbers are big-endian.
//!
//! <https://datatracker.ietf.org/doc/draft-ietf-sshm-ssh-agent/>

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// The longest message, in bytes without its length: OpenSSH's limit (`AGENT_MAX_LEN`).
pub(super) const MAX_MESSAGE_BYTES: usize = 256 * 1024;

pub(super) const FAILURE: u8 = 5;
pub(super) const REQUEST_IDENTITIES: u8 = 11;
pub(super) const IDENTITIES_ANSWER: u8 = 12;
pub(super) const SIGN_REQUEST: u8 = 13;
pub(super) const SIGN_RESPONSE: u8 = 14;
pub(super) const EXTENSION: u8 = 27;
pub(super) const EXTENSION_FAILURE: u8 = 28;

/// Flag of a sign request: sign with `rsa-sha2-256`.
pub(super) const RSA_SHA2_256: u32 = 2;
/// Flag of a sign request: sign with `rsa-sha2-512`.
pub(super) const RSA_SHA2_512: u32 = 4;

/// What a client asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Request<'m> {
    /// Which keys there are.
    Identities,
    /// A signature.
    Sign {
        /// The public key, as the list of identities has it.
        key: &'m [u8],
        /// What is to be signed.
        data: &'m [u8],
        /// [`RSA_SHA2_256`] and the like.
        flags: u32,
    },
    /// An extension of the protocol.
    Extension,
    /// Something that changes the agent, is unknown or is malformed, of this type.
    Other(u8),
}

/// What `message` asks for. Malformed requests are [`Request::Other`].
pub(super) fn request(message: &[u8]) -> Request<'_> {
    match message.split_first() {
        Some((&REQUEST_IDENTITIES, [])) => Request::Identities,
        Some((&SIGN_REQUEST, body)) => sign_request(body).unwrap_or(Request::Other(SIGN_REQUEST)),
        Some((&EXTENSION, _)) => Request::Extension,
        Some((&kind, _)) => Request::Other(kind),
        None => Request::Other(0),
    }
}

fn sign_request(body: &[u8]) -> Option<Request<'_>> {
    let (key, rest) = string(body)?;
    let (data, rest) = string(rest)?;
    let flags = u32::from_be_bytes(rest.try_into().ok()?);
    Some(Request::Sign { key, data, flags })
}

/// The string that `bytes` begin with, and what follows it.
pub(super) fn string(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk()?;
    rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)
}

/// Appends `value` as a string.
///
/// # Panics
/// If `value` has 4 GiB: everything here comes from files and messages far below that.
pub(super) fn put_string(message: &mut Vec<u8>, value: &[u8]) {
    let length = u32::try_from(value.len()).expect("keys and signatures are short");
    message.extend_from_slice(&length.to_be_bytes());
    message.extend_from_slice(value);
}

/// The answer to [`Request::Identities`]: public keys, without comments.
pub(super) fn identities_answer<'k>(keys: impl ExactSizeIterator<Item = &'k [u8]>) -> Vec<u8> {
    let mut message = vec![IDENTITIES_ANSWER];
    let count = u32::try_from(keys.len()).expect("one key per argument");
    message.extend_from_slice(&count.to_be_bytes());
    for key in keys {
        put_string(&mut message, key);
        put_string(&mut message, b"");
    }
    message
}

/// The answer to [`Request::Sign`].
pub(super) fn sign_response(signature: &[u8]) -> Vec<u8> {
    let mut message = vec![SIGN_RESPONSE];
    put_string(&mut message, signature);
    message
}

/// Reads one message; none at the end of the stream.
///
/// # Errors
/// `InvalidData` for an empty or overlong message, `UnexpectedEof` in the middle of one.
pub(super) async fn read_message(
    stream: &mut (impl AsyncRead + Unpin),
) -> io::Result<Option<Vec<u8>>> {
    let mut first = [0];
    if stream.read(&mut first).await? == 0 {
        return Ok(None);
    }
    let mut others = [0; 3];
    stream.read_exact(&mut others).await?;
    let length = u32::from_be_bytes([first[0], others[0], others[1], others[2]]) as usize;
    if length == 0 || length > MAX_MESSAGE_BYTES {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("an agent message of {length} bytes (it must have 1 to {MAX_MESSAGE_BYTES})"),
        ));
    }
    let mut message = vec![0; length];
    stream.read_exact(&mut message).await?;
    Ok(Some(message))
}

/// Writes one message.
///
/// # Errors
/// `InvalidData` for an overlong message.
pub(super) async fn write_message(
    stream: &mut (impl AsyncWrite + Unpin),
    message: &[u8],
) -> io::Result<()> {
    if message.len() > MAX_MESSAGE_BYTES {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("an agent message of more than {MAX_MESSAGE_BYTES} bytes"),
        ));
    }
    let mut framed = Vec::with_capacity(4 + message.len());
    put_string(&mut framed, message);
    stream.write_all(&framed).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(mut bytes: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime.block_on(read_message(&mut bytes))
    }

    #[test]
    fn messages_are_read_whole_or_refused() {
        assert_eq!(read(b"").unwrap(), None);
        assert_eq!(read(b"\0\0\0\x02\x0b\xff").unwrap().unwrap(), b"\x0b\xff");
        let kind = |bytes: &[u8]| read(bytes).unwrap_err().kind();
        assert_eq!(kind(b"\0\0\0\0"), io::ErrorKind::InvalidData);
        assert_eq!(kind(b"\0\x04\0\x01\x0b"), io::ErrorKind::InvalidData);
        assert_eq!(kind(b"\xff\xff\xff\xff"), io::ErrorKind::InvalidData);
        assert_eq!(kind(b"\0\0"), io::ErrorKind::UnexpectedEof);
        assert_eq!(kind(b"\0\0\0\x02\x0b"), io::ErrorKind::UnexpectedEof);
        let mut longest = b"\0\x04\0\0".to_vec();
        longest.resize(4 + MAX_MESSAGE_BYTES, 7);
        assert_eq!(read(&longest).unwrap().unwrap(), &longest[4..]);
    }

    #[test]
    fn requests() {
        let check = |message: &[u8], expected: Request<'_>| {
            assert_eq!(request(message), expected, "{message:?}");
        };
        check(b"\x0b", Request::Identities);
        check(b"\x0b\0", Request::Other(11));
        check(
            b"\x0d\0\0\0\x03key\0\0\0\x02hi\0\0\0\x04",
            Request::Sign {
                key: b"key",
                data: b"hi",
                flags: RSA_SHA2_512,
            },
        );
        // No flags, too much, a length beyond the end.
        check(b"\x0d\0\0\0\x03key\0\0\0\x02hi", Request::Other(13));
        check(
            b"\x0d\0\0\0\x03key\0\0\0\x02hi\0\0\0\x04\0",
            Request::Other(13),
        );
        check(b"\x0d\xff\xff\xff\xffkey", Request::Other(13));
        check(b"\x0d", Request::Other(13));
        check(b"\x1b\0\0\0\x01x", Request::Extension);
        check(b"\x13", Request::Other(19));
        check(b"", Request::Other(0));
    }

    #[test]
    fn answers() {
        assert_eq!(
            identities_answer([&b"ab"[..], b"c"].into_iter()),
            b"\x0c\0\0\0\x02\0\0\0\x02ab\0\0\0\0\0\0\0\x01c\0\0\0\0"
        );
        assert_eq!(sign_response(b"sig"), b"\x0e\0\0\0\x03sig");
    }
}
