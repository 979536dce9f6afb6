//! Sparse files in all forms that GNU tar writes: the old header, and PAX 0.0, 0.1, 1.0.
//!
//! Every form says the same: the size of the file, and which pieces of it are in the
//! archive, in order; the rest are holes.
//!
//! <https://www.gnu.org/software/tar/manual/html_section/Sparse-Formats.html>

use super::header::{BLOCK, number};
use super::pax;

/// A piece of a sparse file that is stored in the archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where in the file.
    pub offset: u64,
    /// How many bytes.
    pub length: u64,
}

/// Checks that segments ascend, do not overlap, end within `size`, and hold `stored` bytes.
pub(super) fn validate(segments: &[Segment], size: u64, stored: u64) -> Result<(), &'static str> {
    let (mut end, mut sum) = (0_u64, 0_u64);
    for segment in segments {
        if segment.offset < end {
            return Err("sparse file whose pieces overlap or are out of order");
        }
        end = segment
            .offset
            .checked_add(segment.length)
            .filter(|end| *end <= size)
            .ok_or("sparse file with a piece beyond its end")?;
        // Cannot overflow: the pieces are disjoint and end within `size`.
        sum += segment.length;
    }
    if sum == stored {
        Ok(())
    } else {
        Err("sparse file whose pieces are not as long as its content")
    }
}

/// What the records of an extended header say of a sparse file.
#[derive(Debug, Default)]
pub(super) struct PaxSparse {
    version: (Option<u64>, Option<u64>),
    /// The name of the file; the header has a made-up one.
    pub(super) name: Option<Vec<u8>>,
    size: Option<u64>,
    count: Option<u64>,
    /// Offsets and lengths, alternating.
    numbers: Vec<u64>,
    seen: bool,
}

/// Where the map of a sparse file is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Map {
    /// Complete: the file's size and its pieces.
    Here(u64, Vec<Segment>),
    /// Before the content, as text; the file's size.
    InContent(u64),
}

impl PaxSparse {
    /// Takes a record whose key begins with `GNU.sparse.`; `max` bounds the number of pieces.
    pub(super) fn record(
        &mut self,
        key: &[u8],
        value: &[u8],
        max: usize,
    ) -> Result<(), &'static str> {
        const BAD: &str = "extended header record GNU.sparse.* with an invalid number";
        let number = || pax::decimal(value).ok_or(BAD);
        self.seen = true;
        match key {
            b"major" => self.version.0 = Some(number()?),
            b"minor" => self.version.1 = Some(number()?),
            b"name" => self.name = Some(value.to_vec()),
            b"size" | b"realsize" => self.size = Some(number()?),
            b"numblocks" => self.count = Some(number()?),
            b"offset" if self.numbers.len().is_multiple_of(2) => self.numbers.push(number()?),
            b"numbytes" if !self.numbers.len().is_multiple_of(2) => self.numbers.push(number()?),
            b"offset" | b"numbytes" => {
                return Err("sparse file whose offsets and lengths do not alternate");
            }
            b"map" => {
                self.numbers.clear();
                for part in value.split(|b| *b == b',') {
                    self.numbers.push(pax::decimal(part).ok_or(BAD)?);
                    self.check_count(max)?;
                }
            }
            _ => {}
        }
        self.check_count(max)
    }

    fn check_count(&self, max: usize) -> Result<(), &'static str> {
        if self.numbers.len() / 2 > max {
            Err("sparse file with too many pieces")
        } else {
            Ok(())
        }
    }

    /// The map, where the records describe a sparse file at all.
    pub(super) fn map(self) -> Result<Option<Map>, &'static str> {
        if !self.seen {
            return Ok(None);
        }
        let size = self.size.ok_or("sparse file without a size")?;
        match self.version {
            (Some(1), Some(0)) => Ok(Some(Map::InContent(size))),
            (None, None) | (Some(0), Some(0 | 1)) => {
                let segments = pairs(&self.numbers)?;
                if self.count != Some(segments.len() as u64) {
                    return Err("sparse file whose number of pieces is wrong");
                }
                Ok(Some(Map::Here(size, segments)))
            }
            _ => Err("sparse file of an unknown version"),
        }
    }
}

fn pairs(numbers: &[u64]) -> Result<Vec<Segment>, &'static str> {
    let chunks = numbers.chunks_exact(2);
    if !chunks.remainder().is_empty() {
        return Err("sparse file with an offset without a length");
    }
    Ok(chunks
        .map(|pair| Segment {
            offset: pair[0],
            length: pair[1],
        })
        .collect())
}

/// Collects the text map of PAX 1.0: the number of pieces, then offsets and lengths, one a line.
#[derive(Debug, Default)]
pub(super) struct TextMap {
    line: Vec<u8>,
    count: Option<usize>,
    numbers: Vec<u64>,
}

impl TextMap {
    /// Takes one block; returns the segments when the map is complete. The rest of that
    /// block is padding.
    pub(super) fn block(
        &mut self,
        block: &[u8; BLOCK],
        max: usize,
    ) -> Result<Option<Vec<Segment>>, &'static str> {
        const BAD: &str = "sparse file whose map has an invalid number";
        for byte in block {
            if *byte != b'\n' {
                self.line.push(*byte);
                if self.line.len() > 20 {
                    return Err(BAD);
                }
                continue;
            }
            let value = pax::decimal(&self.line).ok_or(BAD)?;
            self.line.clear();
            match self.count {
                None => {
                    let count = usize::try_from(value).ok().filter(|n| *n <= max);
                    self.count = Some(count.ok_or("sparse file with too many pieces")?);
                }
                Some(_) => self.numbers.push(value),
            }
            if self
                .count
                .is_some_and(|count| self.numbers.len() == 2 * count)
            {
                return pairs(&self.numbers).map(Some);
            }
        }
        Ok(None)
    }
}

/// The pieces in an old GNU header (four, from byte 386) or a continuation block (21, from
/// its beginning), and whether a continuation follows.
pub(super) fn old_gnu(
    block: &[u8; BLOCK],
    continuation: bool,
    segments: &mut Vec<Segment>,
    max: usize,
) -> Result<bool, &'static str> {
    const BAD: &str = "sparse file whose header has an invalid number";
    const ENTRY: usize = 24;
    let (map, extended) = if continuation {
        (&block[..21 * ENTRY], block[504])
    } else {
        (&block[386..386 + 4 * ENTRY], block[482])
    };
    for entry in map.chunks_exact(ENTRY) {
        if entry[0] == 0 {
            break;
        }
        if segments.len() >= max {
            return Err("sparse file with too many pieces");
        }
        let field = |bytes| number(bytes).and_then(|n| u64::try_from(n).ok()).ok_or(BAD);
        segments.push(Segment {
            offset: field(&entry[..12])?,
            length: field(&entry[12..])?,
        });
    }
    Ok(extended != 0)
}

/// The size of the file in an old GNU header.
pub(super) fn old_gnu_size(block: &[u8; BLOCK]) -> Option<u64> {
    number(&block[483..495]).and_then(|n| u64::try_from(n).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segments(pairs: &[(u64, u64)]) -> Vec<Segment> {
        let segment = |(offset, length): &(u64, u64)| Segment {
            offset: *offset,
            length: *length,
        };
        pairs.iter().map(segment).collect()
    }

    #[test]
    fn maps_must_be_consistent() {
        for (pairs, size, stored, expected) in [
            (&[(0, 5), (10, 5), (20, 0)][..], 20, 10, Ok(())),
            (&[], 20, 0, Ok(())),
            (
                &[(5, 5), (0, 5)],
                20,
                10,
                Err("sparse file whose pieces overlap or are out of order"),
            ),
            (
                &[(0, 5), (4, 5)],
                20,
                10,
                Err("sparse file whose pieces overlap or are out of order"),
            ),
            (
                &[(16, 5)],
                20,
                5,
                Err("sparse file with a piece beyond its end"),
            ),
            (
                &[(u64::MAX, 5)],
                20,
                5,
                Err("sparse file with a piece beyond its end"),
            ),
            (
                &[(0, 5)],
                20,
                4,
                Err("sparse file whose pieces are not as long as its content"),
            ),
        ] {
            assert_eq!(
                validate(&segments(pairs), size, stored),
                expected,
                "{pairs:?}"
            );
        }
    }

    fn from_records(records: &[(&str, &str)]) -> Result<Option<Map>, &'static str> {
        let mut sparse = PaxSparse::default();
        for (key, value) in records {
            sparse.record(key.as_bytes(), value.as_bytes(), 3)?;
        }
        sparse.map()
    }

    #[test]
    fn records_give_a_map() {
        let expected = || Ok(Some(Map::Here(9, segments(&[(0, 1), (5, 2)]))));
        assert_eq!(from_records(&[]), Ok(None));
        assert_eq!(
            from_records(&[
                ("size", "9"),
                ("numblocks", "2"),
                ("offset", "0"),
                ("numbytes", "1"),
                ("offset", "5"),
                ("numbytes", "2")
            ]),
            expected()
        );
        assert_eq!(
            from_records(&[("size", "9"), ("numblocks", "2"), ("map", "0,1,5,2")]),
            expected()
        );
        assert_eq!(
            from_records(&[("major", "1"), ("minor", "0"), ("realsize", "9")]),
            Ok(Some(Map::InContent(9)))
        );
        for (records, problem) in [
            (
                &[("major", "2"), ("minor", "0"), ("size", "9")][..],
                "sparse file of an unknown version",
            ),
            (&[("map", "0,1")], "sparse file without a size"),
            (
                &[("size", "9"), ("map", "0,1")],
                "sparse file whose number of pieces is wrong",
            ),
            (
                &[("size", "9"), ("numblocks", "1"), ("map", "0,1,2")],
                "sparse file with an offset without a length",
            ),
            (
                &[("numbytes", "1")],
                "sparse file whose offsets and lengths do not alternate",
            ),
            (
                &[("map", "0,1,2,3,4,5,6,7,8,9")],
                "sparse file with too many pieces",
            ),
            (
                &[("size", "x")],
                "extended header record GNU.sparse.* with an invalid number",
            ),
        ] {
            assert_eq!(from_records(records), Err(problem), "{records:?}");
        }
    }

    #[test]
    fn a_text_map_may_span_blocks() {
        let mut text = b"2\n0\n1\n".to_vec();
        text.extend(b"000000000005\n".iter());
        let mut block = [0; BLOCK];
        block[..text.len()].copy_from_slice(&text);
        // The last number continues in the next block.
        block[text.len()..].fill(b'0');
        let mut map = TextMap::default();
        assert_eq!(
            map.block(&block, 9),
            Err("sparse file whose map has an invalid number")
        );

        let mut map = TextMap::default();
        let mut first = [b'\n'; BLOCK];
        first[..510].fill(b'0');
        assert_eq!(
            map.block(&first, 9),
            Err("sparse file whose map has an invalid number")
        );

        let mut map = TextMap::default();
        let numbers = format!("100\n{}", "00001\n".repeat(200));
        let (first, second) = numbers.as_bytes().split_at(BLOCK);
        assert_eq!(map.block(first.try_into().unwrap(), 100), Ok(None));
        let (second, third) = second.split_at(BLOCK);
        assert_eq!(map.block(second.try_into().unwrap(), 100), Ok(None));
        let mut last = [0; BLOCK];
        last[..third.len()].copy_from_slice(third);
        let segments = map.block(&last, 100).unwrap().unwrap();
        assert_eq!(
            segments,
            [Segment {
                offset: 1,
                length: 1
            }; 100]
        );
        assert_eq!(
            TextMap::default().block(&last, 0),
            Err("sparse file with too many pieces")
        );
    }
}
