//! `.gitmodules`: where submodules come from.
//!
//! <https://git-scm.com/docs/gitmodules>

use gix_object::bstr::{BString, ByteSlice};

/// The name of the file.
pub(super) const FILE_NAME: &[u8] = b".gitmodules";

/// What `.gitmodules` says of one submodule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Module {
    /// Its name, under which git keeps its repository.
    pub(super) name: String,
    /// Where it is in the tree.
    pub(super) path: BString,
    /// Where it comes from; may be relative.
    pub(super) url: String,
    /// Whether `git submodule update` leaves it out.
    pub(super) is_skipped: bool,
}

/// Reads `.gitmodules`. Entries without path or URL are left out, as git does.
///
/// # Errors
/// A text, where it is no configuration file, or has a name or value that git refuses because
/// it would lead a careless program elsewhere.
pub(super) fn parse(bytes: &[u8]) -> Result<Vec<Module>, String> {
    let file = gix_config::File::from_bytes_no_includes(
        bytes,
        gix_config::file::Metadata::api(),
        Default::default(),
    )
    .map_err(|error| super::objects::causes(&error))?;
    let mut modules: Vec<Module> = Vec::new();
    for section in file.sections_by_name("submodule").into_iter().flatten() {
        let Some(name) = section.header().subsection_name() else {
            continue;
        };
        let section_name = Some(name);
        let name = name
            .to_str()
            .map_err(|_| "a submodule's name is no UTF-8".to_owned())?;
        if modules.iter().any(|module| module.name == name) {
            continue;
        }
        let text = |key: &str| file.string_by("submodule", section_name, key);
        let (Some(path), Some(url)) = (text("path"), text("url")) else {
            continue;
        };
        let parts = || name.split(['/', '\\']);
        if name.is_empty()
            || name.chars().any(char::is_control)
            || parts().any(|part| matches!(part, "" | "." | ".."))
        {
            return Err(format!("a submodule cannot have the name {name:?}"));
        }
        let update = text("update");
        let is_skipped = match update.as_ref().map(|value| value.as_slice()) {
            None => false,
            Some(b"none") => true,
            Some(b"checkout" | b"rebase" | b"merge") => false,
            Some(other) => {
                return Err(format!(
                    "submodule {name:?}: update has the value {:?}; a repository may not name \
                     commands",
                    other.as_bstr()
                ));
            }
        };
        let url = url
            .to_str()
            .map_err(|_| format!("submodule {name:?}: its url is no UTF-8"))?;
        modules.push(Module {
            name: name.to_owned(),
            path,
            url: url.to_owned(),
            is_skipped,
        });
    }
    Ok(modules)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_submodules_there_are() {
        let got = parse(
            b"[core]\n\tx = y\n[submodule \"a b\"]\n\tpath = lib/a # note\n\turl = \"../a.git\"\n\
              [submodule \"none\"]\n path = n\n url = u\n update = none\n\
              [submodule \"half\"]\n path = h\n[submodule]\n path = x\n",
        )
        .unwrap();
        let module = |name: &str, path: &str, url: &str, is_skipped| Module {
            name: name.to_owned(),
            path: path.into(),
            url: url.to_owned(),
            is_skipped,
        };
        assert_eq!(
            got,
            [
                module("a b", "lib/a", "../a.git", false),
                module("none", "n", "u", true)
            ]
        );
        assert_eq!(parse(b"").unwrap(), []);
        let wrong = |text: &str, expected: &str| {
            let error = parse(text.as_bytes()).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        };
        let named = |name: &str| format!("[submodule \"{name}\"]\n path = a\n url = u\n");
        wrong(&named("../../hooks"), "cannot have the name");
        wrong(&named("a/../b"), "cannot have the name");
        wrong(&named("/a"), "cannot have the name");
        wrong(&format!("{} update = !id\n", named("a")), "commands");
        wrong("[submodule \"a\n", "");
    }
}
