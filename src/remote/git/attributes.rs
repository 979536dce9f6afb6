//! What `.gitattributes` change in the files of a checkout: line ends, `$Id$`, encodings.
//!
//! Filters that are programs (such as git-lfs) come from a user's configuration, of which a
//! build has none, so files that need them stay as they are in the repository; as with BuildKit.
//!
//! <https://git-scm.com/docs/gitattributes#_checking_out_and_checking_in>

use std::path::{Path, PathBuf};

use gix_attributes::search::{MetadataCollection, Outcome};
use gix_attributes::{Search, StateRef};
use gix_filter::Pipeline;
use gix_filter::pipeline::convert::to_worktree::{Options, UnknownEncoding};
use gix_object::bstr::{BStr, ByteSlice};

/// The attributes that the filters do in part: the encoder knows no UTF-16, and `$Id$` is not
/// quite as git has it.
const OWN: [&str; 2] = ["working-tree-encoding", "ident"];
/// The name of the files.
pub(super) const FILE_NAME: &[u8] = b".gitattributes";

/// The attributes on the way from the root to the directory that is being written.
pub(super) struct Attributes {
    search: Search,
    names: MetadataCollection,
    pipeline: Pipeline,
    /// Set where a file speaks of what is completed here.
    own: Option<Outcome>,
    /// Whether any file was found; without one nothing is changed.
    any: bool,
}

impl Attributes {
    /// None yet but the built-in `binary`.
    ///
    /// # Errors
    /// A text, where the built-in ones cannot be read, which is a defect.
    pub(super) fn new(hash: gix_hash::Kind) -> Result<Self, String> {
        let mut names = MetadataCollection::default();
        let none: [PathBuf; 0] = [];
        let search = Search::new_globals(none, &mut Vec::new(), &mut names)
            .map_err(|error| error.to_string())?;
        Ok(Self {
            search,
            names,
            pipeline: Pipeline::new(
                Default::default(),
                hash,
                gix_filter::pipeline::Options::default(),
            ),
            own: None,
            any: false,
        })
    }

    /// Enters the directory `path` (empty for the root), whose file has `bytes`.
    ///
    /// # Errors
    /// A text, where they cannot be read.
    pub(super) fn push(&mut self, path: &Path, bytes: &[u8]) -> Result<(), String> {
        // Only the root's may define macros.
        let macros = path.as_os_str().is_empty();
        let file = path.join(".gitattributes");
        let root = Some(Path::new(""));
        self.any = true;
        self.search
            .add_patterns_buffer(bytes, file, root, &mut self.names, macros)
            .map_err(|error| error.to_string())?;
        if self.own.is_some() || OWN.iter().any(|name| bytes.contains_str(name)) {
            let mut outcome = Outcome::default();
            outcome.initialize_with_selection(&self.names, OWN);
            self.own = Some(outcome);
        }
        Ok(())
    }

    /// Leaves the directory that was entered last.
    pub(super) fn pop(&mut self) {
        self.search.pop_pattern_list();
    }

    /// What is written for the file `path`, whose blob is `id`; `None` where that is what the repository has.
    ///
    /// # Errors
    /// A text, where `bytes` cannot be converted.
    pub(super) fn converted(
        &mut self,
        path: &BStr,
        id: &gix_hash::oid,
        bytes: &[u8],
    ) -> Result<Option<Vec<u8>>, String> {
        if !self.any {
            return Ok(None);
        }
        let (search, names) = (&self.search, &self.names);
        let mut attributes = |path: &BStr, found: &mut gix_attributes::search::Outcome| {
            found.initialize(names);
            let case = gix_attributes::glob::pattern::Case::Sensitive;
            search.pattern_matching_relative_path(path, case, Some(false), found);
        };
        let options = Options {
            unknown_encoding: UnknownEncoding::Ignore,
            ..Options::default()
        };
        let converted = self
            .pipeline
            .convert_to_worktree(bytes, path, &mut attributes, options)
            .map_err(|error| super::objects::causes(&error))?;
        let mut changed = converted
            .is_changed()
            .then(|| converted.as_bytes().map(<[u8]>::to_vec))
            .flatten();
        let Some(outcome) = &mut self.own else {
            return Ok(changed);
        };
        outcome.initialize(&self.names);
        let case = gix_attributes::glob::pattern::Case::Sensitive;
        self.search
            .pattern_matching_relative_path(path, case, Some(false), outcome);
        let mut selected = outcome.iter_selected().map(|found| found.assignment.state);
        let (encoding, ident) = (selected.next(), selected.next());
        if let (Some(text), Some(StateRef::Set)) = (&mut changed, ident) {
            *text = text.replace(format!("$Id: {id}$"), format!("$Id: {id} $"));
        }
        if let Some(StateRef::Value(name)) = encoding
            && let Some(text) = wide(name.as_bstr(), changed.as_deref().unwrap_or(bytes))
        {
            changed = Some(text);
        }
        Ok(changed)
    }
}

/// UTF-8 in a wider form of Unicode; `None` where `encoding` is none, or the text is not UTF-8,
/// which git leaves as it is, too.
fn wide(encoding: &[u8], text: &[u8]) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(text).ok()?;
    let name = encoding.to_ascii_uppercase();
    let name = name.strip_prefix(b"UTF-").or(name.strip_prefix(b"UTF"))?;
    // Without an order of bytes it is the machine's, and a mark says so.
    let (is_wider, is_big, mark) = match name {
        b"16" | b"16LE-BOM" => (false, false, true),
        b"16LE" => (false, false, false),
        b"16BE" => (false, true, false),
        b"16BE-BOM" => (false, true, true),
        b"32" | b"32LE-BOM" => (true, false, true),
        b"32LE" => (true, false, false),
        b"32BE" => (true, true, false),
        b"32BE-BOM" => (true, true, true),
        _ => return None,
    };
    let mut out = Vec::with_capacity(text.len() * 2 + 4);
    for c in mark.then_some('\u{feff}').into_iter().chain(text.chars()) {
        if is_wider {
            let unit = u32::from(c);
            out.extend(if is_big {
                unit.to_be_bytes()
            } else {
                unit.to_le_bytes()
            });
            continue;
        }
        for unit in c.encode_utf16(&mut [0; 2]) {
            out.extend(if is_big {
                unit.to_be_bytes()
            } else {
                unit.to_le_bytes()
            });
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_ends_and_more_are_as_the_attributes_say() {
        let mut attributes = Attributes::new(gix_hash::Kind::Sha1).unwrap();
        let check = |attributes: &mut Attributes, path: &str, bytes: &[u8], want: Option<&[u8]>| {
            let id = gix_object::compute_hash(gix_hash::Kind::Sha1, gix_object::Kind::Blob, bytes);
            let got = attributes
                .converted(path.into(), &id.unwrap(), bytes)
                .unwrap();
            assert_eq!(got.as_deref(), want, "{path}");
        };
        check(&mut attributes, "a.bat", b"x\n", None);
        attributes
            .push(
                Path::new(""),
                b"*.bat text eol=crlf\n*.id ident\n*.bin binary\n/d/* eol=crlf\n\
                  *.u16 working-tree-encoding=UTF-16LE\n\
                  b.u16 working-tree-encoding=utf-16 eol=crlf\n\
                  *.latin working-tree-encoding=ISO-8859-1\n[attr]dos eol=crlf\n*.dos dos\n\
                  *.lfs filter=lfs -text\n",
            )
            .unwrap();
        check(&mut attributes, "a.bat", b"x\ny\r\n", Some(b"x\r\ny\r\n"));
        check(&mut attributes, "a.txt", b"x\n", None);
        check(&mut attributes, "d/a.bin", b"x\n", None);
        check(&mut attributes, "a.dos", b"x\n", Some(b"x\r\n"));
        check(&mut attributes, "a.u16", b"x\n", Some(b"x\0\n\0"));
        check(&mut attributes, "a.u16", b"\xff", None);
        check(
            &mut attributes,
            "b.u16",
            b"x\n",
            Some(b"\xff\xfex\0\r\0\n\0"),
        );
        check(&mut attributes, "a.latin", "é".as_bytes(), Some(b"\xe9"));
        check(&mut attributes, "a.lfs", b"version x\n", None);
        check(
            &mut attributes,
            "a.id",
            b"$Id$",
            Some(b"$Id: b3f5ebfb5843bc43ceecff6d4f26bb37c615beb1 $"),
        );
        check(&mut attributes, "e/a.txt", b"x\n", None);
        attributes
            .push(Path::new("e"), b"*.txt eol=crlf\n*.bat -text\n")
            .unwrap();
        check(&mut attributes, "e/a.txt", b"x\n", Some(b"x\r\n"));
        check(&mut attributes, "e/a.bat", b"x\n", None);
        attributes.pop();
        check(&mut attributes, "e/a.bat", b"x\n", Some(b"x\r\n"));
    }
}
