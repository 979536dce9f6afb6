//! The corpus in `fuzz/corpus/layer`, and what is made of it by chance, against
//! [`properties`](super::properties); and a real layer.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::properties::{Outcome, layer, reader, text};
use super::testing::{apply_bytes, describe, is_root, tar_of, walk};
use super::{Limits, list};
use crate::image::{DiffId, Digest, MediaType};

/// Archives made of each file of the corpus.
const MUTANTS: usize = 20;

/// Each file of the corpus: its name, and its bytes.
fn corpus() -> Vec<(String, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/layer");
    let entries = std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut files: Vec<_> = entries
        .map(|entry| {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            (name, std::fs::read(entry.path()).unwrap())
        })
        .collect();
    files.sort();
    files
}

/// Whether there is no ID that a file could not be given to, and no device that cannot be made.
fn has_all_ids() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap();
    map.split_whitespace().eq(["0", "0", "4294967295"])
}

#[test]
fn security_s03_the_corpus_loses_nothing_and_stays_inside() {
    if !is_root() {
        return;
    }
    let arena = tempfile::tempdir().unwrap();
    let has_all_ids = has_all_ids();
    let (mut applied, mut refused) = (0, Vec::new());
    for (name, bytes) in corpus() {
        reader(&bytes);
        match layer(&bytes, arena.path(), has_all_ids) {
            Outcome::Applied(lines) => {
                assert!(lines > 0 || name.starts_with("hostile-"), "{name}");
                applied += 1;
            }
            Outcome::Refused => refused.push(name),
        }
    }
    assert!(applied >= 40, "{applied} were applied");
    // What real tools wrote is applied; owners beyond those of a user namespace are not.
    refused.retain(|name| !name.starts_with("hostile-") && !name.starts_with("found-"));
    let expected: &[&str] = if has_all_ids {
        &[]
    } else {
        &["owners-gnu.tar", "owners-pax.tar"]
    };
    assert_eq!(refused, expected);
}

/// Numbers that are the same everywhere: xorshift64*.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % limit.max(1)
    }
}

/// Makes something else of an archive, of which a reader gets to see much: headers have right
/// checksums mostly.
fn mutate(dice: &mut Dice, mut bytes: Vec<u8>, other: &[u8]) -> Vec<u8> {
    const ODD: [&[u8]; 10] = [
        b"\0",
        b"/",
        b"..",
        b".wh.",
        b"\xff\xff\xff\xff",
        b"\x80",
        b"7777777",
        b" ",
        b"=",
        b"-1",
    ];
    for _ in 0..1 + dice.below(4) {
        let blocks = bytes.len() / 512;
        let (one, two) = (dice.below(blocks) * 512, dice.below(blocks) * 512);
        let at = dice.below(bytes.len());
        match dice.below(9) {
            0 if blocks > 1 => drop(bytes.drain(one..one + 512)),
            1 if blocks > 1 => {
                let block = bytes[one..one + 512].to_vec();
                bytes.splice(two..two, block);
            }
            2 => {
                let from = dice.below(other.len() / 512) * 512;
                let length = 512 * (1 + dice.below(4));
                let piece = other[from..other.len().min(from + length)].to_vec();
                bytes.splice(one..one, piece);
            }
            3 => bytes.truncate(at),
            4 if at < bytes.len() => bytes[at] ^= 1 << dice.below(8),
            5 if blocks > 0 => {
                // The type of an entry.
                let kinds = b"0123456xgLKS\0";
                bytes[one + 156] = kinds[dice.below(kinds.len())];
            }
            _ if blocks > 0 => {
                let odd = ODD[dice.below(ODD.len())];
                // Mostly where a field begins.
                let field = [0, 100, 108, 124, 136, 157, 345, 386][dice.below(8)];
                let at = if dice.below(3) > 0 { one + field } else { at };
                let end = bytes.len().min(at + odd.len());
                bytes[at..end].copy_from_slice(&odd[..end - at]);
            }
            _ => {}
        }
    }
    if dice.below(5) > 0 {
        for header in bytes.chunks_exact_mut(512) {
            if header[257..262] == *b"ustar" {
                header[148..156].fill(b' ');
                let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
                header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
        }
    }
    bytes
}

#[test]
fn security_s03_what_is_made_of_the_corpus_loses_nothing_and_stays_inside() {
    if !is_root() {
        return;
    }
    let arena = tempfile::tempdir().unwrap();
    let has_all_ids = has_all_ids();
    let corpus = corpus();
    let (mut applied, mut refused) = (0, 0);
    for (number, (name, bytes)) in corpus.iter().enumerate() {
        for mutant in 0..MUTANTS {
            let seed = (number * MUTANTS + mutant + 1) as u64;
            let mut dice = Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
            let (_, other) = &corpus[dice.below(corpus.len())];
            let bytes = mutate(&mut dice, bytes.clone(), other);
            let check = std::panic::AssertUnwindSafe(|| {
                reader(&bytes);
                layer(&bytes, arena.path(), has_all_ids)
            });
            match std::panic::catch_unwind(check) {
                Ok(Outcome::Applied(_)) => applied += 1,
                Ok(Outcome::Refused) => refused += 1,
                Err(panic) => {
                    // To be looked at, and to become part of the corpus.
                    let kept = std::env::temp_dir().join(format!("found-{number}-{mutant}.tar"));
                    std::fs::write(&kept, &bytes).unwrap();
                    let resumed = format!("mutant {mutant} of {name}, kept as {}", kept.display());
                    std::panic::resume_unwind(match panic.downcast::<String>() {
                        Ok(said) => Box::new(format!("{resumed}: {said}")),
                        Err(_) => Box::new(resumed),
                    });
                }
            }
        }
    }
    assert!(
        applied > 200 && refused > 400,
        "{applied} applied, {refused} refused"
    );
}

/// The root file system of a Debian, as debootstrap leaves it; made where there is none yet.
fn debian() -> Result<PathBuf, String> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let cache = std::env::var_os("SOCKLESS_TEST_CACHE")
        .map_or_else(|| here.join("target/fixtures"), PathBuf::from);
    let tar = cache.join("debian-bookworm.tar");
    if !tar.is_file() {
        let made = Command::new(here.join("tests/debian-base.sh"))
            .arg(&tar)
            .output();
        let made = made.map_err(|error| error.to_string())?;
        if !made.status.success() {
            return Err(String::from_utf8_lossy(&made.stderr).into_owned());
        }
    }
    Ok(tar)
}

#[test]
fn sandbox_a_real_layer_loses_nothing() {
    if !is_root() {
        return;
    }
    let bytes = match debian() {
        Ok(tar) => std::fs::read(tar).unwrap(),
        Err(reason) => return super::testing::skip(&reason),
    };
    let listing = |bytes: &[u8]| {
        let want = DiffId::from_uncompressed(Digest::of(bytes));
        let listed = list(bytes, &MediaType::LAYER_TAR, &want, &Limits::default());
        listed.unwrap_or_else(|error| panic!("{}", text(error)))
    };
    let dir = tempfile::tempdir().unwrap();
    let trees = ["first", "second"].map(|name| dir.path().join(name));
    let mut written = Vec::new();
    let mut lines = Vec::new();
    for tree in &trees {
        std::fs::create_dir(tree).unwrap();
        let from = if written.is_empty() { &bytes } else { &written };
        let applied = apply_bytes(from, tree, &Limits::default());
        let applied = applied.unwrap_or_else(|error| panic!("{}", text(error)));
        assert_eq!(applied.skipped_devices, []);
        assert_eq!(applied.skipped_xattrs, []);
        assert_eq!(applied.implied_directories, [""; 0].map(PathBuf::from));
        let found = describe(walk(tree));
        let again = tar_of(walk(tree));
        if lines.is_empty() {
            assert!(found.len() > 5000, "{}", found.len());
            assert!(listing(&again).to_bytes() == listing(&bytes).to_bytes());
            (written, lines) = (again, found);
        } else {
            for (second, first) in found.iter().zip(&lines) {
                assert_eq!(second, first);
            }
            assert_eq!(found.len(), lines.len());
            assert_eq!(Digest::of(&again), Digest::of(&written));
        }
        crate::store::remove_tree(tree).unwrap();
    }
}
