//! Any text with variables: an answer with a place inside the text, in bounded size.

#![no_main]

#[allow(dead_code, unreachable_pub, unused_imports)]
#[path = "../../src/dockerfile/mod.rs"]
mod dockerfile;

use dockerfile::expand::{Environment, MAX_EXPANSION_BYTES, Options, expand};
use dockerfile::{parse_check, parse_mount};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, &str)| {
    let (bits, text) = input;
    let environment: Environment = [("a", "a"), ("e", ""), ("p", "*?\\"), ("l", "x y\nz/*}")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
    let options = Options {
        keep_quotes: bits & 1 > 0,
        keep_escapes: bits & 2 > 0,
        literal_quotes: bits & 4 > 0,
        keep_unset: bits & 8 > 0,
    };
    let escape = if bits & 16 > 0 { '`' } else { '\\' };
    match expand(text, escape, &environment, options) {
        Ok(expansion) => assert!(expansion.text.len() <= MAX_EXPANSION_BYTES + text.len()),
        Err(error) => assert!(text.get(error.range).is_some()),
    }
    if let Err(error) = parse_check(text) {
        assert!(text.get(error.range).is_some());
    }
    let mut expand_one =
        |text: &str| Ok(expand(text, escape, &environment, Options::default())?.text);
    if let Err(error) = parse_mount(text, &mut expand_one) {
        assert!(text.get(error.range).is_some());
    }
});
