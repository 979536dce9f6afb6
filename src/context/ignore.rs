//! `.dockerignore`: which paths of a build context are left out.
//!
//! Rules are tried in order and the last one that matches a path decides; `!` takes paths
//! back in. A rule that matches a directory holds for everything in it. Besides the
//! wildcards of [`super::glob`] there is `**`, any number of directories. This follows
//! moby's `patternmatcher` as BuildKit's walk uses it, oddities included: a rule `**name`
//! without wildcards matches every path that ends in `name`, and a `!` rule counts for a
//! directory's content only if it matches that itself or was tried on the directory.
//!
//! Which file has the rules, and that the Dockerfile stays readable, is the caller's.
//!
//! <https://docs.docker.com/build/concepts/context/#dockerignore-files>

use std::cell::OnceCell;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use super::glob::{self, GlobError, MAX_PATTERN_BYTES, States, Token};

/// Larger files are refused.
pub const MAX_IGNORE_FILE_BYTES: usize = 1 << 20;

/// More rules are refused: each is tried on each path.
pub const MAX_IGNORE_RULES: usize = 10_000;

/// Why an ignore file cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IgnoreError {
    /// A rule that cannot be read.
    #[error("line {line}: invalid pattern {pattern:?}")]
    Pattern {
        /// From 1.
        line: usize,
        /// As written, without blanks around it.
        pattern: String,
        /// What is wrong.
        #[source]
        source: GlobError,
    },
    /// `!` without anything to take back in.
    #[error("line {line}: \"!\" must be followed by a pattern")]
    LoneExclamation {
        /// From 1.
        line: usize,
    },
    /// Larger than [`MAX_IGNORE_FILE_BYTES`].
    #[error("the file has {0} bytes, more than the {MAX_IGNORE_FILE_BYTES} allowed")]
    FileTooLarge(usize),
    /// More than [`MAX_IGNORE_RULES`].
    #[error("line {line}: the file has more than {MAX_IGNORE_RULES} rules")]
    TooManyRules {
        /// From 1; of the first rule too many.
        line: usize,
    },
}

/// Why a pattern of [`IgnoreRules::from_patterns`] cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// A wildcard is wrong.
    #[error(transparent)]
    Glob(#[from] GlobError),
    /// `!` without anything to take back in.
    #[error("\"!\" must be followed by a pattern")]
    LoneExclamation,
}

/// The rules of one ignore file. The default ignores nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IgnoreRules {
    rules: Vec<Rule>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    /// Whether it takes paths back in.
    exception: bool,
    matcher: Matcher,
}

/// How a rule matches a whole path.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Matcher {
    Exact(Vec<u8>),
    Prefix(Vec<u8>),
    /// Ends in it, or is it without its leading slash.
    Suffix(Vec<u8>),
    Tokens(Vec<Token>),
}

/// Which rules matched a directory, for the paths in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectoryMatch(Vec<bool>);

impl IgnoreRules {
    /// Reads an ignore file.
    ///
    /// # Errors
    /// [`IgnoreError`] for the first rule that cannot be read, or if there is too much.
    pub fn parse(text: &[u8]) -> Result<Self, IgnoreError> {
        if text.len() > MAX_IGNORE_FILE_BYTES {
            return Err(IgnoreError::FileTooLarge(text.len()));
        }
        let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
        let mut rules = Vec::new();
        for (index, written) in text.split(|&b| b == b'\n').enumerate() {
            let line = index + 1;
            if written.first() == Some(&b'#') {
                continue;
            }
            let written = trim(written);
            if written.is_empty() {
                continue;
            }
            if rules.len() == MAX_IGNORE_RULES {
                return Err(IgnoreError::TooManyRules { line });
            }
            let (exception, pattern) = normalise(written);
            if exception && pattern.is_empty() {
                return Err(IgnoreError::LoneExclamation { line });
            }
            let matcher = compile(&pattern).map_err(|source| IgnoreError::Pattern {
                line,
                pattern: String::from_utf8_lossy(written).chars().take(200).collect(),
                source,
            })?;
            rules.push(Rule { exception, matcher });
        }
        Ok(Self { rules })
    }

    /// Rules from a list of patterns, as `COPY --exclude` and `--parents` have them.
    ///
    /// Unlike lines of a file they are taken as they are, only cleaned: one with a leading
    /// slash matches nothing, and `!` counts where it is the first character.
    ///
    /// # Errors
    /// The first pattern that cannot be read, and why.
    pub fn from_patterns<'p>(
        patterns: impl IntoIterator<Item = &'p str>,
    ) -> Result<Self, (String, PatternError)> {
        let mut rules = Vec::new();
        for written in patterns {
            let trimmed = written.trim();
            if trimmed.is_empty() {
                continue;
            }
            let cleaned = clean(trimmed.as_bytes());
            let (exception, pattern) = match cleaned.strip_prefix(b"!") {
                Some([]) => return Err((written.to_owned(), PatternError::LoneExclamation)),
                Some(pattern) => (true, pattern),
                None => (false, cleaned.as_slice()),
            };
            let matcher = compile(pattern)
                .map_err(|error| (written.to_owned(), PatternError::Glob(error)))?;
            rules.push(Rule { exception, matcher });
        }
        Ok(Self { rules })
    }

    /// Whether there are no rules.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Whether some rule takes paths back in.
    pub fn has_exceptions(&self) -> bool {
        self.rules.iter().any(|rule| rule.exception)
    }

    /// Whether a rule leaves out whatever is in the root: `*`, `**` or `**/*`.
    pub fn hides_everything(&self) -> bool {
        let all: Vec<Matcher> = ["*", "**", "**/*"]
            .iter()
            .filter_map(|pattern| compile(pattern.as_bytes()).ok())
            .collect();
        let mut rules = self.rules.iter();
        rules.any(|rule| !rule.exception && all.contains(&rule.matcher))
    }

    /// Whether `path`, relative to the context's root, is left out. The root never is.
    ///
    /// Looks at every directory above `path` as well; a walk that has done so already uses
    /// [`IgnoreRules::step`].
    pub fn is_ignored(&self, path: &Path) -> bool {
        let mut ignored = false;
        let mut above = None;
        let mut partial = Vec::new();
        for name in names(path) {
            push_component(&mut partial, name);
            let (now, matched) = self.step_bytes(&partial, above.as_ref());
            ignored = now;
            above = Some(matched);
        }
        ignored
    }

    /// Whether `path` is left out, and what to pass for the paths in it if it is a
    /// directory. `above` is what this returned for the directory that `path` is in; `None`
    /// in the root.
    pub fn step(&self, path: &Path, above: Option<&DirectoryMatch>) -> (bool, DirectoryMatch) {
        if self.rules.is_empty() {
            return (false, DirectoryMatch(Vec::new()));
        }
        self.step_bytes(&joined(path), above)
    }

    fn step_bytes(&self, path: &[u8], above: Option<&DirectoryMatch>) -> (bool, DirectoryMatch) {
        let mut ignored = false;
        // The same for all rules, and made only if one of them needs it.
        let symbols = OnceCell::new();
        let matches = self.rules.iter().enumerate().map(|(index, rule)| {
            let inherited = above.is_some_and(|above| above.0.get(index) == Some(&true));
            // A rule that cannot change anything is not tried, and then is not inherited.
            let matched =
                inherited || (rule.exception == ignored && rule.matcher.matches(path, &symbols));
            if matched {
                ignored = !rule.exception;
            }
            matched
        });
        let matches = DirectoryMatch(matches.collect());
        (ignored, matches)
    }

    /// Whether something in the ignored directory `directory` may be taken back in. If not,
    /// a walk need not enter it.
    pub fn may_reinclude_below(&self, directory: &Path) -> bool {
        self.may_match_below(directory, true)
    }

    /// Whether a rule that is no exception may match something in the directory `directory`
    /// that it does not match itself.
    pub fn may_ignore_below(&self, directory: &Path) -> bool {
        self.may_match_below(directory, false)
    }

    fn may_match_below(&self, directory: &Path, exception: bool) -> bool {
        let mut prefix = joined(directory);
        if !prefix.is_empty() {
            prefix.push(b'/');
        }
        let mut rules = self.rules.iter().filter(|r| r.exception == exception);
        rules.any(|rule| rule.matcher.may_match_below(&prefix))
    }
}

impl Matcher {
    /// Whether all of `path` matches, whose symbols are kept for the next one who asks.
    fn matches(&self, path: &[u8], symbols: &OnceCell<Vec<glob::Symbol>>) -> bool {
        match self {
            Self::Exact(exact) => exact == path,
            Self::Prefix(prefix) => path.starts_with(prefix),
            Self::Suffix(suffix) => {
                path.ends_with(suffix) || suffix.strip_prefix(b"/") == Some(path)
            }
            Self::Tokens(tokens) => {
                let symbols = symbols.get_or_init(|| glob::symbols(path));
                States::new(tokens).advance(symbols).accepted()
            }
        }
    }

    /// Whether a path that begins with `prefix` and is longer may match.
    fn may_match_below(&self, prefix: &[u8]) -> bool {
        match self {
            Self::Exact(exact) => exact.len() > prefix.len() && exact.starts_with(prefix),
            Self::Prefix(start) => start.starts_with(prefix) || prefix.starts_with(start),
            Self::Suffix(_) => true,
            Self::Tokens(tokens) => States::new(tokens)
                .advance(&glob::symbols(prefix))
                .may_go_on(),
        }
    }
}

/// The names in a relative path.
fn names(path: &Path) -> impl Iterator<Item = &[u8]> {
    path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.as_bytes()),
        _ => None,
    })
}

fn joined(path: &Path) -> Vec<u8> {
    let mut joined = Vec::new();
    names(path).for_each(|name| push_component(&mut joined, name));
    joined
}

fn push_component(path: &mut Vec<u8>, name: &[u8]) {
    if !path.is_empty() {
        path.push(b'/');
    }
    path.extend(name);
}

/// A line's pattern in its shortest form, relative, and whether `!` stands before it.
fn normalise(written: &[u8]) -> (bool, Vec<u8>) {
    let Some(rest) = written.strip_prefix(b"!") else {
        return (false, relative(written));
    };
    let rest = trim(rest);
    let pattern = if rest.is_empty() {
        Vec::new()
    } else {
        relative(rest)
    };
    // "!/" is cleaned once more together with its exclamation mark.
    let pattern = if pattern == b"/" { Vec::new() } else { pattern };
    (true, pattern)
}

/// `path` cleaned and without a leading slash.
fn relative(path: &[u8]) -> Vec<u8> {
    let mut cleaned = clean(path);
    if cleaned.len() > 1 && cleaned[0] == b'/' {
        cleaned.remove(0);
    }
    cleaned
}

/// What Go's `path.Clean` does: no empty names, no `.`, no `..` behind a name.
fn clean(path: &[u8]) -> Vec<u8> {
    let rooted = path.first() == Some(&b'/');
    let mut names: Vec<&[u8]> = Vec::new();
    for name in path.split(|&b| b == b'/') {
        match name {
            b"" | b"." => {}
            b".." if names.last().is_some_and(|last| *last != b"..") => {
                names.pop();
            }
            b".." if rooted => {}
            name => names.push(name),
        }
    }
    let joined = names.join(&b'/');
    match (rooted, joined.is_empty()) {
        (true, _) => [b"/".as_slice(), &joined].concat(),
        (false, true) => b".".to_vec(),
        (false, false) => joined,
    }
}

/// `text` without white space at its ends.
fn trim(text: &[u8]) -> &[u8] {
    match str::from_utf8(text) {
        Ok(text) => text.trim().as_bytes(),
        Err(_) => text.trim_ascii(),
    }
}

fn compile(pattern: &[u8]) -> Result<Matcher, GlobError> {
    if pattern.len() > MAX_PATTERN_BYTES {
        return Err(GlobError::TooLong(pattern.len()));
    }
    let is = |symbol: Option<&u32>, c: char| symbol == Some(&u32::from(c));
    let symbols = glob::symbols(pattern);
    let mut rest = symbols.as_slice();
    let mut tokens = Vec::new();
    let mut matcher = Matcher::Exact(pattern.to_vec());
    let mut simple = true;
    while !rest.is_empty() {
        let first = rest.len() == symbols.len();
        if is(rest.first(), '*') && is(rest.get(1), '*') {
            rest = &rest[2..];
            if is(rest.first(), '/') {
                rest = &rest[1..];
            }
            if first {
                // Unless a wildcard follows.
                matcher = Matcher::Suffix(pattern[2..].to_vec());
            }
            if !rest.is_empty() {
                let slash = Token::Literal(u32::from('/'));
                tokens.extend([Token::SkipTwo, Token::Everything, slash]);
                simple &= first;
            } else if let (Matcher::Exact(_), true) = (&matcher, simple) {
                matcher = Matcher::Prefix(pattern[..pattern.len() - 2].to_vec());
            } else {
                tokens.push(Token::Everything);
                simple &= first;
            }
            continue;
        }
        let special = is(rest.first(), '\\') || is(rest.first(), ']');
        let Some(token) = glob::next_token(&mut rest)? else {
            break;
        };
        simple &= !special && matches!(token, Token::Literal(_));
        tokens.push(token);
    }
    Ok(if simple {
        matcher
    } else {
        Matcher::Tokens(tokens)
    })
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    #[test]
    fn what_hides_everything_is_known() {
        for text in ["*", "/*\n", "a\n**", "**/*", "!a\n*"] {
            assert!(rules(text).hides_everything(), "{text}");
        }
        for text in ["", ".*", "a", "*/*", "!*", "?*"] {
            assert!(!rules(text).hides_everything(), "{text}");
        }
        assert!(rules("a\n!b").has_exceptions());
        assert!(!rules("a").has_exceptions());
    }

    #[test]
    fn patterns_of_a_list_are_taken_as_they_are() {
        let ignored = |patterns: &[&str], path: &str| {
            let rules = IgnoreRules::from_patterns(patterns.iter().copied()).unwrap();
            rules.is_ignored(Path::new(path))
        };
        for (patterns, path, expected) in [
            (&["a"][..], "a", true),
            (&["a"], "a/b", true),
            (&["a"], "b/a", false),
            (&["./a/../b/"], "b", true),
            (&["/a"], "a", false),
            (&[" a "], "a", true),
            (&["", "#a"], "#a", true),
            (&["**/c.txt"], "c.txt", true),
            (&["*", "!keep"], "keep", false),
            (&["*", "! keep"], "keep", true),
            (&["*", "!/keep"], "keep", true),
            (&["*.txt", "!a.txt", "a.*"], "a.txt", true),
        ] {
            assert_eq!(ignored(patterns, path), expected, "{patterns:?} {path}");
        }
        let failure = |pattern| IgnoreRules::from_patterns([pattern]).unwrap_err();
        assert_eq!(
            failure("!"),
            ("!".to_owned(), PatternError::LoneExclamation)
        );
        let unterminated = PatternError::Glob(GlobError::UnterminatedClass);
        assert_eq!(failure("a["), ("a[".to_owned(), unterminated));
        let rules = IgnoreRules::from_patterns(["a/*/c", "!d/e"]).unwrap();
        for (directory, expected) in [("", true), ("a", true), ("a/b", true), ("d", false)] {
            let found = rules.may_ignore_below(Path::new(directory));
            assert_eq!(found, expected, "{directory}");
        }
        assert!(rules.may_reinclude_below(Path::new("d")));
    }

    fn rules(text: &str) -> IgnoreRules {
        IgnoreRules::parse(text.as_bytes()).unwrap()
    }

    #[track_caller]
    fn check(text: &str, ignored: &[&str], kept: &[&str]) {
        let rules = rules(text);
        for path in ignored {
            assert!(rules.is_ignored(Path::new(path)), "{text:?} {path}");
        }
        for path in kept {
            assert!(!rules.is_ignored(Path::new(path)), "{text:?} {path}");
        }
    }

    #[test]
    fn names_match_from_the_root() {
        check(
            "a.txt\nd\n",
            &["a.txt", "d", "d/x", "d/x/y"],
            &["", "x/a.txt", "dd"],
        );
        check("d/e", &["d/e", "d/e/f"], &["d", "d/f", "e"]);
        check("A.TXT", &[], &["a.txt"]);
    }

    #[test]
    fn wildcards_stop_at_slashes() {
        check("*.md", &["a.md", ".md"], &["d/a.md", "a.mdx"]);
        check("*/e", &["d/e", "d/e/f"], &["e", "d/d/e"]);
        check("[ot]?p", &["top", "oop"], &["tp", "pop", "t/p"]);
        check("d/*.txt", &["d/a.txt"], &["d/e/a.txt"]);
        check("a[^b]c", &["axc", "a/c"], &["abc"]);
        check("b.*", &["b.md"], &["bxmd"]);
        check("*", &["a", "a/b"], &[""]);
    }

    #[test]
    fn double_stars_cross_slashes() {
        check("**/*.md", &["a.md", "d/a.md", "d/e/a.md"], &["a.mdx"]);
        check(
            "d/**/a",
            &["d/a", "d/x/a", "d/x/y/a", "d/a/b"],
            &["a", "dx/a", "d/xa"],
        );
        check("**", &["a", "a/b"], &[""]);
        check("**/x", &["x", "d/x", "d/x/y"], &["xx", "d/xx"]);
        check("**x", &["x", "ax", "d/ax"], &["xa"]);
        check("**x*", &["x", "xa", "d/xa"], &["ax", "d/ax"]);
        check("d/**", &["d/a", "d/a/b"], &["d", "dx"]);
        check("d**", &["d", "dx", "d/a"], &["xd"]);
        check("**/d/**", &["d/a", "x/d/a"], &["d", "x/d"]);
        check("d/e?/**", &["d/ex/a"], &["d/ex", "d/e/a"]);
        check("**/\\*.md", &["*.md", "d/*.md"], &["a.md"]);
        check("a/***/b", &["a/x/b", "a/x/y/b"], &["a/b", "a"]);
    }

    #[test]
    fn spellings_are_normalised() {
        check("/a\n", &["a"], &["b/a"]);
        check("./a/", &["a", "a/b"], &[]);
        check("a//b/../c", &["a/c"], &["a/b"]);
        check("../a", &[], &["a"]);
        check("  a  \n\t\n   \n", &["a"], &[" a"]);
        check("/", &[], &["a"]);
        check(".", &[], &["a", ""]);
        check("\u{feff}a\r\nb\r\n", &["a", "b"], &[]);
        check("# a\n #b\n\\#c\n", &["#b", "#c"], &["a", "# a"]);
        check("/../a", &["a"], &[]);
        check("//", &[], &["a"]);
    }

    #[test]
    fn the_last_match_decides() {
        check("*.txt\n!a.txt", &["b.txt"], &["a.txt"]);
        check("!a.txt\n*.txt", &["a.txt", "b.txt"], &[]);
        check(
            "*\n!d/e\nd/e/f",
            &["a", "d", "d/x", "d/e/f"],
            &["d/e", "d/e/g"],
        );
        check("d\n!d/e\nd/e/a", &["d/e/a", "d/x"], &["d/e", "d/e/b"]);
        check("**\n!**/a", &["b", "d/b"], &["a", "d/a"]);
        check("d\n! d/e", &["d/f"], &["d/e"]);
        check("d\n!/d/e/", &["d/f"], &["d/e"]);
        check("!!a\n*\n!!a", &["a"], &["!a"]);
    }

    #[test]
    fn exceptions_for_a_directory_count_if_they_were_tried_on_it() {
        // "!a" is not tried on "a", which is not ignored, and does not match "a/x".
        check("a/x\n!a", &["a/x"], &["a"]);
        check("*\na/x\n!a", &["b"], &["a", "a/x"]);
    }

    #[test]
    fn steps_are_what_is_ignored_does() {
        let rules = rules("*\n!d\nd/**/x\n!d/e/f/x");
        let mut above = None;
        let mut steps = Vec::new();
        for path in ["d", "d/e", "d/e/f", "d/e/f/x"] {
            let (ignored, matched) = rules.step(Path::new(path), above.as_ref());
            assert_eq!(ignored, rules.is_ignored(Path::new(path)));
            steps.push(ignored);
            above = Some(matched);
        }
        assert_eq!(steps, [false; 4]);
        assert!(rules.is_ignored(Path::new("d/e/x")));
    }

    #[test]
    fn directories_are_pruned_when_nothing_comes_back() {
        let below = |text: &str, directory: &str, expected: bool| {
            let found = rules(text).may_reinclude_below(Path::new(directory));
            assert_eq!(found, expected, "{text:?} {directory}");
        };
        below("*", "d", false);
        below("*\n!d/e", "d", true);
        below("*\n!d/e", "x", false);
        below("*\n!d/e", "d/e", false);
        below("*\n!d/e", "", true);
        below("*\n!d/*/x", "d/e", true);
        below("*\n!d/*/x", "d/e/f", false);
        below("*\n!d/?x", "d", true);
        below("*\n!d/?x", "e", false);
        below("*\n!**/x", "a/b/c", true);
        below("*\n!**/x*", "a/b/c", true);
        below("*\n!d/**", "d/e", true);
        below("*\n!d/**", "x", false);
        below("*\n!dx**", "d", false);
    }

    #[test]
    fn names_need_not_be_utf8() {
        let rules = IgnoreRules::parse(b"a\xff\n?\xfe\n").unwrap();
        let ignored = |name: &[u8]| rules.is_ignored(Path::new(OsStr::from_bytes(name)));
        assert!(ignored(b"a\xff"));
        assert!(!ignored(b"b\xff"));
        assert!(ignored(b"\xff\xfe"));
    }

    #[test]
    fn bad_files_are_errors() {
        let fails = |text: &str, expected: &str| {
            let error = IgnoreRules::parse(text.as_bytes()).unwrap_err();
            let chain = match std::error::Error::source(&error) {
                Some(source) => format!("{error}: {source}"),
                None => error.to_string(),
            };
            assert_eq!(chain, expected);
        };
        fails("a\n\n !", "line 3: \"!\" must be followed by a pattern");
        fails("!/", "line 1: \"!\" must be followed by a pattern");
        fails(
            "a\n [x ",
            "line 2: invalid pattern \"[x\": the class that begins with \"[\" has no end",
        );
        fails(
            "**/\\",
            "line 1: invalid pattern \"**/\\\\\": \"\\\" at the end escapes nothing",
        );
        fails(
            &"a\n".repeat(10_001),
            "line 10001: the file has more than 10000 rules",
        );
        fails(
            &"#".repeat((1 << 20) + 1),
            "the file has 1048577 bytes, more than the 1048576 allowed",
        );
    }
}
