//! The table of settings in README.md is made from the one that the program reads by.
//!
//! After a change of settings, `SOCKLESS_REGENERATE=1 cargo test --test it readme` writes it anew.

use crate::support::repository;

const BEGIN: &str = "<!-- settings: made from src/config.rs -->\n";
const END: &str = "<!-- end of settings -->";

#[test]
fn readme_has_the_settings_of_the_program() {
    let path = repository().join("README.md");
    let text = std::fs::read_to_string(&path).expect("README.md");
    let (before, rest) = text.split_once(BEGIN).expect("the begin of the settings");
    let (table, after) = rest.split_once(END).expect("the end of the settings");
    let want = format!("\n{}\n", sockless::config::settings_table_markdown().trim());
    if std::env::var_os("SOCKLESS_REGENERATE").is_some() {
        std::fs::write(&path, format!("{before}{BEGIN}{want}{END}{after}")).expect("README.md");
    } else {
        assert_eq!(table, want, "see the top of tests/it/readme.rs");
    }
}
