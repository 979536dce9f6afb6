//! From the stored bytes of a layer to its tar.

use std::io::{self, BufReader, Chain, Cursor, Read};

use flate2::bufread::MultiGzDecoder;
use zstd::stream::read::Decoder as ZstdDecoder;

use super::LayerError;
use crate::image::MediaType;

/// Buffer between the source and the decompressor; large, because each read of the
/// source may be a system call or a wake-up of another task.
const INPUT_BUFFER_BYTES: usize = 128 << 10;

/// The largest zstd window, as a power of two: 32 MiB of memory for each layer that is
/// read. Builders use at most 8 MiB; `zstd --ultra -22` and `--long` can exceed it.
///
/// <https://www.rfc-editor.org/rfc/rfc8878#section-3.1.1.1.2>
const ZSTD_WINDOW_LOG_MAX: u32 = 25;

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// Skippable frames have sixteen magic numbers; one may come first (zstd:chunked, pzstd).
const ZSTD_SKIPPABLE_MAGIC: [u8; 3] = [0x2a, 0x4d, 0x18];

type Input<R> = BufReader<Chain<Cursor<Vec<u8>>, R>>;

/// The uncompressed bytes of a layer. Fails where the compressed ones are damaged or cut.
#[expect(missing_debug_implementations, reason = "the decoders have none")]
pub struct Decompressed<R: Read>(Kind<R>);

enum Kind<R: Read> {
    Plain(Input<R>),
    Gzip(Box<MultiGzDecoder<Input<R>>>),
    Zstd(Box<ZstdDecoder<'static, Input<R>>>),
}

/// Decompresses the layer that `input` is, of type `media_type`.
///
/// The type must be that of a layer, OCI's or Docker's; how the bytes are compressed,
/// they say themselves, as in containerd: registries hold layers that are labelled
/// wrongly, and digest and diff ID are checked anyway. Gzip may have several members,
/// zstd several frames; both are read to the end of `input`.
///
/// # Errors
/// [`LayerError::MediaType`]; [`LayerError::Read`].
pub fn decompress<R: Read>(
    media_type: &MediaType,
    mut input: R,
) -> Result<Decompressed<R>, LayerError> {
    if media_type.oci_layer().is_none() {
        return Err(LayerError::MediaType(media_type.clone()));
    }
    let mut magic = Vec::with_capacity(4);
    (&mut input)
        .take(4)
        .read_to_end(&mut magic)
        .map_err(LayerError::Read)?;
    let is_gzip = magic.starts_with(&GZIP_MAGIC);
    let is_zstd = magic == ZSTD_MAGIC
        || (magic.len() == 4 && magic[0] & 0xf0 == 0x50 && magic[1..] == ZSTD_SKIPPABLE_MAGIC);
    let input = BufReader::with_capacity(INPUT_BUFFER_BYTES, Cursor::new(magic).chain(input));
    Ok(Decompressed(if is_gzip {
        Kind::Gzip(Box::new(MultiGzDecoder::new(input)))
    } else if is_zstd {
        let mut decoder = ZstdDecoder::with_buffer(input).map_err(LayerError::Read)?;
        decoder
            .window_log_max(ZSTD_WINDOW_LOG_MAX)
            .map_err(LayerError::Read)?;
        Kind::Zstd(Box::new(decoder))
    } else {
        Kind::Plain(input)
    }))
}

impl<R: Read> Read for Decompressed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.0 {
            Kind::Plain(reader) => reader.read(buffer),
            Kind::Gzip(reader) => reader.read(buffer),
            Kind::Zstd(reader) => reader.read(buffer),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn read(media_type: &MediaType, bytes: &[u8]) -> Result<Vec<u8>, String> {
        let mut out = Vec::new();
        decompress(media_type, bytes)
            .map_err(|e| e.to_string())?
            .read_to_end(&mut out)
            .map_err(|e| e.to_string())?;
        Ok(out)
    }

    #[test]
    fn content_says_how_it_is_compressed() {
        let zstd = |bytes: &[u8]| zstd::encode_all(bytes, 3).unwrap();
        let skippable = [b"\x5a\x2a\x4d\x18\x02\0\0\0ab".to_vec(), zstd(b"text")].concat();
        for (bytes, expected) in [
            (gzip(b"text"), &b"text"[..]),
            ([gzip(b"te"), gzip(b""), gzip(b"xt")].concat(), b"text"),
            (zstd(b"text"), b"text"),
            ([zstd(b"te"), zstd(b"xt")].concat(), b"text"),
            (skippable, b"text"),
            (b"text".to_vec(), b"text"),
            (b"te".to_vec(), b"te"),
            (Vec::new(), b""),
        ] {
            for media_type in [
                MediaType::LAYER_GZIP,
                MediaType::DOCKER_LAYER_TAR,
                MediaType::LAYER_ZSTD,
            ] {
                assert_eq!(read(&media_type, &bytes).unwrap(), expected, "{media_type}");
            }
        }
    }

    #[test]
    fn what_is_no_layer_or_damaged_is_refused() {
        assert_eq!(
            read(&MediaType::CONFIG, b"").unwrap_err(),
            "unsupported layer media type \"application/vnd.oci.image.config.v1+json\": \
             expected a tar, tar+gzip or tar+zstd layer of OCI or Docker"
        );
        let whole = gzip(&vec![b'x'; 100_000]);
        for cut in [whole.len() - 1, whole.len() / 2, 12] {
            read(&MediaType::LAYER_GZIP, &whole[..cut]).unwrap_err();
        }
        let mut flipped = whole.clone();
        let end = flipped.len() - 6;
        flipped[end] ^= 1;
        read(&MediaType::LAYER_GZIP, &flipped).unwrap_err();
        read(
            &MediaType::LAYER_GZIP,
            &[whole, b"garbage".to_vec()].concat(),
        )
        .unwrap_err();
        let whole = zstd::encode_all(&vec![b'x'; 100_000][..], 3).unwrap();
        read(&MediaType::LAYER_ZSTD, &whole[..whole.len() - 1]).unwrap_err();
    }

    #[test]
    fn security_s16_a_zstd_window_beyond_the_limit_is_refused() {
        // A frame header that asks for a window of 2^28 bytes, and an empty last block.
        let frame = [&ZSTD_MAGIC[..], &[0x00, (28 - 10) << 3], &[1, 0, 0]].concat();
        let error = read(&MediaType::LAYER_ZSTD, &frame).unwrap_err();
        assert!(error.contains("too much memory"), "{error}");
        let frame = [&ZSTD_MAGIC[..], &[0x00, (25 - 10) << 3], &[1, 0, 0]].concat();
        assert_eq!(read(&MediaType::LAYER_ZSTD, &frame).unwrap(), b"");
    }
}
