//! One 512-byte header block: its fields, its numbers, its checksum.
//!
//! Layout after POSIX ustar, with what GNU and star do differently.
//! <https://pubs.opengroup.org/onlinepubs/9799919799/utilities/pax.html#tag_20_94_13_06>

use std::ops::Range;

/// The unit of a tar.
pub(super) const BLOCK: usize = 512;

pub(super) const NAME: Range<usize> = 0..100;
pub(super) const MODE: Range<usize> = 100..108;
pub(super) const UID: Range<usize> = 108..116;
pub(super) const GID: Range<usize> = 116..124;
pub(super) const SIZE: Range<usize> = 124..136;
pub(super) const MTIME: Range<usize> = 136..148;
const CHECKSUM: Range<usize> = 148..156;
const TYPE: usize = 156;
pub(super) const LINK: Range<usize> = 157..257;
const MAGIC_AND_VERSION: Range<usize> = 257..265;
pub(super) const MAJOR: Range<usize> = 329..337;
pub(super) const MINOR: Range<usize> = 337..345;
pub(super) const PREFIX: Range<usize> = 345..500;
/// star keeps times behind a shorter prefix.
const STAR_PREFIX: Range<usize> = 345..476;
const STAR_TRAILER: Range<usize> = 508..512;

/// Which fields a header has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// Before POSIX: no magic, no prefix, no devices.
    V7,
    /// POSIX.
    Ustar,
    /// Schilling's star.
    Star,
    /// GNU: no prefix.
    Gnu,
}

/// A header block.
#[derive(Clone)]
pub(super) struct Header(pub(super) [u8; BLOCK]);

impl Header {
    /// An empty ustar header of type `kind`.
    pub(super) fn ustar(kind: u8) -> Self {
        let mut header = Self([0; BLOCK]);
        header.0[TYPE] = kind;
        header.0[MAGIC_AND_VERSION].copy_from_slice(b"ustar\x0000");
        header
    }

    /// The type flag.
    pub(super) fn kind(&self) -> u8 {
        self.0[TYPE]
    }

    /// Whether every byte is zero: the end of the archive.
    pub(super) fn is_zero(&self) -> bool {
        self.0.iter().all(|b| *b == 0)
    }

    /// Which fields there are.
    pub(super) fn format(&self) -> Format {
        match &self.0[MAGIC_AND_VERSION] {
            b"ustar  \0" => Format::Gnu,
            magic if magic.starts_with(b"ustar\0") => {
                if &self.0[STAR_TRAILER] == b"tar\0" {
                    Format::Star
                } else {
                    Format::Ustar
                }
            }
            _ => Format::V7,
        }
    }

    /// The name, with its prefix where the format has one.
    pub(super) fn name(&self) -> Vec<u8> {
        let prefix = match self.format() {
            Format::Ustar => text(&self.0[PREFIX]),
            Format::Star => text(&self.0[STAR_PREFIX]),
            Format::V7 | Format::Gnu => b"",
        };
        let name = text(&self.0[NAME]);
        if prefix.is_empty() {
            name.to_vec()
        } else {
            [prefix, b"/", name].concat()
        }
    }

    /// The text of a field, up to its first NUL.
    pub(super) fn text(&self, field: Range<usize>) -> &[u8] {
        text(&self.0[field])
    }

    /// The number in a field; `None` where it is none or too large.
    pub(super) fn number(&self, field: Range<usize>) -> Option<i64> {
        number(&self.0[field])
    }

    /// Whether the checksum is right. Some old archivers summed signed bytes.
    pub(super) fn checksum_is_right(&self) -> bool {
        let (unsigned, signed) = self.sums();
        let stored = self.number(CHECKSUM);
        stored == Some(unsigned) || stored == Some(signed)
    }

    /// Puts `bytes` into a text field, cut to its size.
    pub(super) fn set_text(&mut self, field: Range<usize>, bytes: &[u8]) {
        let field = &mut self.0[field];
        let length = bytes.len().min(field.len());
        field[..length].copy_from_slice(&bytes[..length]);
    }

    /// Puts `value` in octal into a numeric field; 0 where it does not fit.
    pub(super) fn set_number(&mut self, field: Range<usize>, value: u64) {
        let digits = field.len() - 1;
        let value = if fits(field.clone(), value) { value } else { 0 };
        let text = format!("{value:0digits$o}");
        self.0[field][..digits].copy_from_slice(text.as_bytes());
    }

    /// Fills in the checksum; the last thing to do.
    pub(super) fn seal(&mut self) {
        let (sum, _) = self.sums();
        let text = format!("{sum:06o}\0 ");
        self.0[CHECKSUM].copy_from_slice(text.as_bytes());
    }

    /// The sums over unsigned and over signed bytes, the checksum itself taken as spaces.
    fn sums(&self) -> (i64, i64) {
        let spaces = CHECKSUM.len() as i64 * i64::from(b' ');
        let others = || {
            self.0[..CHECKSUM.start]
                .iter()
                .chain(&self.0[CHECKSUM.end..])
        };
        (
            spaces + others().map(|b| i64::from(*b)).sum::<i64>(),
            spaces + others().map(|b| i64::from(b.cast_signed())).sum::<i64>(),
        )
    }
}

/// Whether `value` fits in octal into a numeric field.
pub(super) fn fits(field: Range<usize>, value: u64) -> bool {
    let bits = 3 * (field.len() - 1);
    value >> bits == 0
}

fn text(field: &[u8]) -> &[u8] {
    field.split(|b| *b == 0).next().unwrap_or_default()
}

/// Octal text, or GNU's base 256 where the highest bit is set.
pub(super) fn number(field: &[u8]) -> Option<i64> {
    match field.first() {
        Some(first) if first & 0x80 != 0 => base_256(field),
        _ => octal(field),
    }
}

/// Octal digits between spaces and NULs. No digits are 0.
fn octal(field: &[u8]) -> Option<i64> {
    let is_pad = |b: &u8| matches!(b, b' ' | 0);
    let start = field.iter().position(|b| !is_pad(b)).unwrap_or(field.len());
    let field = &field[start..];
    let end = field.iter().position(is_pad).unwrap_or(field.len());
    field[..end].iter().try_fold(0_i64, |value, byte| {
        let digit = (*byte as char).to_digit(8)?;
        value.checked_mul(8)?.checked_add(i64::from(digit))
    })
}

/// Big-endian two's complement; the highest bit only says that this is base 256.
fn base_256(field: &[u8]) -> Option<i64> {
    let negative = field[0] & 0x40 != 0;
    let first = if negative { field[0] } else { field[0] & 0x7f };
    let fill = if negative { 0xff } else { 0 };
    let (high, low) = field.split_at(field.len().saturating_sub(8));
    if high.is_empty() {
        // Eight bytes, of which the first has seven bits: the sign has to be extended.
        let mut bytes = [fill; 8];
        bytes[8 - low.len()..].copy_from_slice(low);
        bytes[8 - low.len()] = first;
        return Some(i64::from_be_bytes(bytes));
    }
    let in_range = first == fill && high[1..].iter().all(|b| *b == fill);
    let value = i64::from_be_bytes(low.try_into().ok()?);
    (in_range && (value < 0) == negative).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_base_256() {
        for (field, expected) in [
            (&b"0000644\0"[..], Some(0o644)),
            (b"   644 \0", Some(0o644)),
            (b"\0\0\0\0\0\0\0\0", Some(0)),
            (b"77777777", Some(0o77_777_777)),
            (b"0000648\0", None),
            (b"-1\0\0\0\0\0\0", None),
            (b"\x80\0\0\0\0\x2d\xc6\xc0", Some(3_000_000)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff", Some(-1)),
            (b"\x80\0\0\0\0\0\0\0\0\0\0\x05", Some(5)),
            (
                b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfb",
                Some(-5),
            ),
            (b"\x80\0\0\0\x80\0\0\0\0\0\0\0", None),
            (b"\x80\0\0\x01\0\0\0\0\0\0\0\0", None),
            (b"\x81\0\0\0\0\0\0\0\0\0\0\0", None),
            (b"777777777777", Some(0o777_777_777_777)),
        ] {
            assert_eq!(number(field), expected, "{}", field.escape_ascii());
        }
        assert_eq!(number(&[b'7'; 24]), None);
    }

    #[test]
    fn a_header_reads_as_it_was_written() {
        let mut header = Header::ustar(b'0');
        header.set_text(NAME, b"name");
        header.set_text(PREFIX, b"some/prefix");
        header.set_number(MODE, 0o4755);
        header.set_number(UID, 0o7_777_777);
        header.set_number(GID, 0o10_000_000);
        header.seal();
        assert!(header.checksum_is_right());
        assert_eq!(header.name(), b"some/prefix/name");
        assert_eq!(header.format(), Format::Ustar);
        assert_eq!(header.number(MODE), Some(0o4755));
        assert_eq!(header.number(UID), Some(2_097_151));
        assert_eq!(header.number(GID), Some(0), "does not fit");
        header.0[0] ^= 1;
        assert!(!header.checksum_is_right());
    }
}
