//! What `.gitattributes` change in the files of a checkout: line ends, `$Id$`, encodings.
//!
//! Filters that are programs (such as git-lfs) come from a user's configuration, of which a
//! build has none, so files that need them stay as they are in the repository; as with BuildKit.
//!
//! <https://git-scm.com/docs/gitattributes#_checking_out_and_checking_in>

use std::path::{Path, PathBuf};

use gix_attributes::Search;
use gix_attributes::search::MetadataCollection;
use gix_filter::Pipeline;
use gix_filter::pipeline::convert::to_worktree::{Options, UnknownEncoding};
use gix_object::bstr::BStr;

/// The name of the files.
pub(super) const FILE_NAME: &[u8] = b".gitattributes";

/// The attributes on the way from the root to the directory that is being written.
pub(super) struct Attributes {
    search: Search,
    names: MetadataCollection,
    pipeline: Pipeline,
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
            .map_err(|error| error.to_string())
    }

    /// Leaves the directory that was entered last.
    pub(super) fn pop(&mut self) {
        self.search.pop_pattern_list();
    }

    /// What is written for the file `path`; `None` where that is what the repository has.
    ///
    /// # Errors
    /// A text, where `bytes` cannot be converted.
    pub(super) fn converted(
        &mut self,
        path: &BStr,
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
        Ok(converted
            .is_changed()
            .then(|| converted.as_bytes().map(<[u8]>::to_vec))
            .flatten())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_ends_and_more_are_as_the_attributes_say() {
        let mut attributes = Attributes::new(gix_hash::Kind::Sha1).unwrap();
        let check = |attributes: &mut Attributes, path: &str, bytes: &[u8], want: Option<&[u8]>| {
            let got = attributes.converted(path.into(), bytes).unwrap();
            assert_eq!(got.as_deref(), want, "{path}");
        };
        check(&mut attributes, "a.bat", b"x\n", None);
        attributes
            .push(
                Path::new(""),
                b"*.bat text eol=crlf\n*.id ident\n*.bin binary\n/d/* eol=crlf\n\
                  *.u16 working-tree-encoding=UTF-16LE\n[attr]dos eol=crlf\n*.dos dos\n\
                  *.lfs filter=lfs -text\n",
            )
            .unwrap();
        check(&mut attributes, "a.bat", b"x\ny\r\n", Some(b"x\r\ny\r\n"));
        check(&mut attributes, "a.txt", b"x\n", None);
        check(&mut attributes, "d/a.bin", b"x\n", None);
        check(&mut attributes, "a.dos", b"x\n", Some(b"x\r\n"));
        check(&mut attributes, "a.u16", b"x", Some(b"x\0"));
        check(&mut attributes, "a.lfs", b"version x\n", None);
        check(
            &mut attributes,
            "a.id",
            b"$Id$",
            Some(b"$Id: 055c8729cdcc372500a08db659c045e16c4409fb $"),
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
