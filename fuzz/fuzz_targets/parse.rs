//! Any bytes as a Dockerfile: an answer with places inside the text, and what was parsed can
//! be printed and parsed again.

#![no_main]

#[allow(dead_code, unreachable_pub, unused_imports)]
#[path = "../../src/dockerfile/mod.rs"]
mod dockerfile;

use dockerfile::InstructionKind;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = dockerfile::parse_trigger(&String::from_utf8_lossy(bytes));
    match dockerfile::parse("Dockerfile", bytes) {
        Ok(file) => {
            let printed = file.to_string();
            let again = match dockerfile::parse("Dockerfile", printed.as_bytes()) {
                Ok(again) => again,
                Err(error) => panic!("{error}\n--- printed\n{printed}"),
            };
            assert_eq!(printed, again.to_string());
            assert_eq!(file.stages.len(), again.stages.len());
            for (stage, other) in file.stages.iter().zip(&again.stages) {
                assert_eq!(stage.original, other.original);
                assert_eq!(stage.instructions.len(), other.instructions.len());
                for (one, other) in stage.instructions.iter().zip(&other.instructions) {
                    assert_eq!(one.original, other.original);
                    assert_eq!(one.kind.name(), other.kind.name());
                    if let (InstructionKind::Run(one), InstructionKind::Run(other)) =
                        (&one.kind, &other.kind)
                    {
                        assert_eq!(one.command, other.command);
                        let contents = |run: &dockerfile::Run| -> Vec<String> {
                            run.heredocs.iter().map(|h| h.content.clone()).collect()
                        };
                        assert_eq!(contents(one), contents(other));
                    }
                }
            }
        }
        Err(error) => {
            assert!(!error.problems.is_empty());
            for problem in &error.problems {
                let span = problem.span;
                assert!(error.text.get(span.start..span.end).is_some());
            }
            let _ = error.to_string();
        }
    }
});
