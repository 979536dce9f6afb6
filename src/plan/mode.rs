//! Symbolic modes of `--chmod`, such as `u=rwX,go-w`: text → changes → a file's new mode.
//!
//! The grammar is that of BSD's `chmod` without a umask, as BuildKit has it. It differs from
//! that of GNU where that is stricter: several operations may follow one another (`u+r-w`),
//! letters and classes to copy may be mixed (`g=ur`), and `t` alone of a list without
//! classes counts (`+rt` is `+t`).
//!
//! <https://man.freebsd.org/cgi/man.cgi?query=chmod&sektion=1>

/// The permission bits of one class at its place.
const OWNER: u32 = 0o700;
const GROUP: u32 = 0o070;
const OTHER: u32 = 0o007;

const SET_USER: u32 = 0o4000;
const SET_GROUP: u32 = 0o2000;
const STICKY: u32 = 0o1000;

/// What no class stands for; not sticky, which has to be named.
const ALL: u32 = SET_USER | SET_GROUP | OWNER | GROUP | OTHER;
const READ: u32 = 0o444;
const WRITE: u32 = 0o222;
const EXECUTE: u32 = 0o111;

/// Changes to a mode, in the order in which they are made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SymbolicMode(Vec<Change>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Set(u32),
    Clear(u32),
    /// `X`: where the file is a directory or was executable for anybody.
    SetIfExecutable(u32),
    /// What one class has, as another gets or loses it.
    Copy {
        /// How far the class's bits are shifted.
        from: u32,
        /// The classes that it is done to; empty is all.
        to: u32,
        operator: char,
    },
}

impl SymbolicMode {
    /// Reads a mode.
    ///
    /// # Errors
    /// What stands where an operator or a permission is expected; empty at the end.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut changes = Vec::new();
        let mut rest = text;
        loop {
            rest = clause(rest, &mut changes)?;
            match rest.strip_prefix(',') {
                Some(next) => rest = next,
                None => return Ok(Self(changes)),
            }
        }
    }

    /// The mode, all twelve bits, of a file that had `mode`.
    pub fn apply(&self, mode: u32, is_directory: bool) -> u32 {
        let was_executable = mode & EXECUTE != 0;
        let mut new = mode;
        for change in &self.0 {
            match *change {
                Change::Set(bits) => new |= bits,
                Change::Clear(bits) => new &= !bits,
                Change::SetIfExecutable(bits) if is_directory || was_executable => new |= bits,
                Change::SetIfExecutable(_) => {}
                Change::Copy { from, to, operator } => {
                    let value = new >> from & OTHER;
                    let to = if to == 0 { ALL } else { to };
                    for (class, shift) in [(OWNER, 6), (GROUP, 3), (OTHER, 0)] {
                        if to & class & READ == 0 {
                            continue;
                        }
                        match operator {
                            '+' => new |= value << shift,
                            '-' => new &= !(value << shift),
                            _ => new = new & !class | value << shift,
                        }
                    }
                }
            }
        }
        new
    }
}

/// One clause: classes, then operators with what they apply. Returns what follows it.
fn clause<'t>(text: &'t str, changes: &mut Vec<Change>) -> Result<&'t str, String> {
    let operators = text.trim_start_matches(['u', 'g', 'o', 'a']);
    let mut who = 0;
    for class in text[..text.len() - operators.len()].chars() {
        who |= match class {
            'u' => SET_USER | OWNER,
            'g' => SET_GROUP | GROUP,
            'o' => OTHER,
            _ => ALL,
        };
    }
    let mut rest = operators;
    loop {
        let mut chars = rest.chars();
        let operator = match chars.next() {
            Some(operator @ ('+' | '-' | '=')) => operator,
            _ => return Err(rest.to_owned()),
        };
        rest = operation(operator, who, chars.as_str(), changes);
        if rest.is_empty() || rest.starts_with(',') {
            return Ok(rest);
        }
    }
}

/// What one operator does with the letters at the start of `text`. Returns what follows them.
fn operation<'t>(
    operator: char,
    mut who: u32,
    text: &'t str,
    changes: &mut Vec<Change>,
) -> &'t str {
    // For others alone the special bits mean nothing.
    let special = who == 0 || who & !OTHER != 0;
    let mut bits = 0;
    let mut conditional = 0;
    // Whether `=` has taken away what is not named.
    let mut is_assigned = operator != '=';
    let of = |who: u32, bits: u32| if who == 0 { bits } else { who & bits };
    let apply = |who, bits, changes: &mut Vec<Change>| match operator {
        '-' => changes.push(Change::Clear(of(who, bits))),
        '+' => changes.push(Change::Set(of(who, bits))),
        _ => changes.extend([
            Change::Clear(of(who, ALL) | who & STICKY),
            Change::Set(of(who, bits)),
        ]),
    };
    let mut rest = text;
    while let Some(letter) = rest.chars().next() {
        match letter {
            'r' => bits |= READ,
            'w' => bits |= WRITE,
            'x' => bits |= EXECUTE,
            'X' if operator == '-' => bits |= EXECUTE,
            'X' => conditional = EXECUTE,
            's' if special => bits |= SET_USER | SET_GROUP,
            't' if special => {
                who |= STICKY;
                bits |= STICKY;
            }
            's' | 't' => {}
            'u' | 'g' | 'o' => {
                if bits != 0 {
                    apply(who, bits, changes);
                    bits = 0;
                }
                is_assigned = true;
                if conditional != 0 {
                    changes.push(Change::SetIfExecutable(of(who, conditional)));
                    conditional = 0;
                }
                let from = match letter {
                    'u' => 6,
                    'g' => 3,
                    _ => 0,
                };
                let to = who;
                changes.push(Change::Copy { from, to, operator });
            }
            _ => break,
        }
        rest = &rest[1..];
    }
    if bits != 0 || !is_assigned {
        apply(who, bits, changes);
    }
    if conditional != 0 {
        changes.push(Change::SetIfExecutable(of(who, conditional)));
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, before: u32, expected: u32) {
        let found = SymbolicMode::parse(text).unwrap().apply(before, false);
        assert_eq!(found, expected, "{text}: {found:o}, not {expected:o}");
    }

    #[track_caller]
    fn check_directory(text: &str, before: u32, expected: u32) {
        let found = SymbolicMode::parse(text).unwrap().apply(before, true);
        assert_eq!(found, expected, "{text}: {found:o}, not {expected:o}");
    }

    #[test]
    fn permissions_are_set_and_cleared() {
        check("go-w", 0o666, 0o644);
        check("u=rw,g=r,o=r", 0o777, 0o644);
        check("+x", 0o640, 0o751);
        check("a-w,u+s", 0o700, 0o4500);
        check("ug+w,o-r", 0o640, 0o660);
        check("u+rw,g+r,o-x,o+w", 0o124, 0o766);
        check("=", 0o7777, 0o1000);
        check("go=", 0o7777, 0o5700);
        check("u=rwx", 0o4644, 0o744);
        check("a=rx", 0o6222, 0o555);
        // The later one wins.
        check("u+r-w", 0o200, 0o400);
        check("u+w,u-w,u+w", 0, 0o200);
        check("-x+r", 0o111, 0o444);
    }

    #[test]
    fn executable_where_it_was_or_a_directory() {
        check("u=rwX,go=rX", 0o640, 0o644);
        check("u=rwX,go=rX", 0o700, 0o755);
        check_directory("u=rwX,go=rX", 0o770, 0o755);
        check("a+X", 0o666, 0o666);
        check("a+X", 0o624, 0o624);
        check("a+X", 0o661, 0o771);
        check_directory("a+X", 0o124, 0o135);
        check("=rw,+X", 0o710, 0o777);
        // It is what the file had at first that counts.
        check("u+x,g+X", 0o600, 0o700);
        check("a-x,u+X", 0o711, 0o700);
        check("a-X", 0o711, 0o600);
        check("g=X", 0o660, 0o600);
    }

    #[test]
    fn classes_are_copied() {
        check("g=u,o=", 0o640, 0o660);
        check("g=u,o=", 0o700, 0o770);
        check("go=u-w", 0o740, 0o755);
        check("o+g", 0o751, 0o755);
        check("g-o", 0o776, 0o716);
        check("=u", 0o640, 0o666);
        check("u=go", 0o741, 0o141);
        // Each part of an assignment takes away what the one before gave.
        check("g=rux", 0o200, 0o210);
        check("o=xXu", 0o601, 0o606);
    }

    #[test]
    fn special_bits() {
        check("u+s", 0o755, 0o4755);
        check("g+s", 0o755, 0o2755);
        check("+s", 0o755, 0o6755);
        check("a-s", 0o6755, 0o755);
        check("o+s", 0o755, 0o755);
        check("+t", 0o755, 0o1755);
        check("u+t", 0o755, 0o1755);
        check("o+t", 0o755, 0o755);
        check("-t", 0o1755, 0o755);
        check("a=t", 0o6755, 0o1000);
        check("=t", 0o755, 0o1755);
        check("+rt", 0o0, 0o1000);
        check("u=rws,g=x", 0, 0o4610);
        check("u+s-s", 0, 0);
    }

    #[test]
    fn what_is_none_is_pointed_at() {
        for (text, at) in [
            ("", ""),
            ("u", ""),
            ("u+q", "q"),
            ("abc", "bc"),
            ("u+x,", ""),
            (",u+x", ",u+x"),
            ("u+x,,g+x", ",g+x"),
            ("+755", "755"),
            ("u+r g+r", " g+r"),
            ("u+é", "é"),
        ] {
            assert_eq!(SymbolicMode::parse(text), Err(at.to_owned()), "{text:?}");
        }
        assert!(SymbolicMode::parse("u+,g-").is_ok());
    }
}
