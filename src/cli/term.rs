//! What is written to a terminal, a pipe or a file: one line at a time, aligned, coloured only for people,
//! and with nothing in it that a sandbox could steer a terminal by (D19).

use std::{
    borrow::Cow,
    env,
    fmt::Write as _,
    io::{self, IsTerminal, Write as _},
    sync::LazyLock,
};

use parking_lot::Mutex;
use serde::Serialize;

/// A colour that means something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Colour {
    /// As the terminal has it.
    #[default]
    Plain,
    /// As it should be.
    Good,
    /// Worth a look.
    Warning,
    /// Wrong.
    Bad,
    /// What points somewhere: a digest.
    Link,
    /// What matters less.
    Faint,
    /// A heading.
    Strong,
}

impl Colour {
    /// Parameters of SGR (ECMA-48, 8.3.117).
    fn code(self) -> &'static str {
        match self {
            Self::Plain => "0",
            Self::Good => "32",
            Self::Warning => "33",
            Self::Bad => "31",
            Self::Link => "33",
            Self::Faint => "2",
            Self::Strong => "1",
        }
    }
}

/// What can be written on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Screen {
    pub(super) colours: bool,
    /// Columns; none if lines may be of any length.
    pub(super) width: Option<usize>,
}

impl Screen {
    /// A pipe or a file.
    #[cfg(test)]
    pub(super) const PLAIN: Self = Self {
        colours: false,
        width: None,
    };

    /// What stdout is.
    pub(super) fn stdout() -> &'static Self {
        static STDOUT: LazyLock<Screen> = LazyLock::new(|| Screen::of(&io::stdout()));
        &STDOUT
    }

    /// What stderr is.
    pub(super) fn stderr() -> &'static Self {
        static STDERR: LazyLock<Screen> = LazyLock::new(|| Screen::of(&io::stderr()));
        &STDERR
    }

    /// <https://no-color.org>: any value but the empty one.
    fn of(stream: &(impl IsTerminal + std::os::fd::AsFd)) -> Self {
        let is_terminal = stream.is_terminal();
        let unset = env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let dumb = env::var_os("TERM").is_none_or(|term| term == "dumb" || term.is_empty());
        let size = is_terminal.then(|| rustix::termios::tcgetwinsize(stream).ok());
        let columns = size.flatten().map(|size| usize::from(size.ws_col));
        Self {
            colours: is_terminal && unset && !dumb,
            width: columns.filter(|columns| *columns > 0),
        }
    }

    fn paint(&self, colour: Colour, text: &str) -> String {
        match self.colours && colour != Colour::Plain && !text.is_empty() {
            true => format!("\x1b[{}m{text}\x1b[0m", colour.code()),
            false => text.to_owned(),
        }
    }
}

/// One cell of a table.
#[derive(Debug, Clone, Default)]
pub(super) struct Cell {
    text: String,
    colour: Colour,
    is_number: bool,
}

impl Cell {
    pub(super) fn new(text: impl Into<String>, colour: Colour) -> Self {
        Self {
            text: text.into(),
            colour,
            is_number: false,
        }
    }

    /// Stands at the right edge of its column.
    pub(super) fn number(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            colour: Colour::Plain,
            is_number: true,
        }
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self::new(text, Colour::Plain)
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        text.to_owned().into()
    }
}

/// Columns as wide as their widest cell; the last one as it is, or as much as the screen is wide.
pub(super) fn align<const N: usize>(rows: &[[Cell; N]], screen: &Screen) -> Vec<String> {
    let shown = rows
        .iter()
        .map(|row| row.each_ref().map(|cell| one_line(&cell.text)));
    let shown: Vec<[String; N]> = shown.collect();
    let width = |i: usize| shown.iter().map(|row| row[i].chars().count()).max();
    let widths: [usize; N] = std::array::from_fn(|i| width(i).unwrap_or(0));
    let mut lines = Vec::new();
    for (row, texts) in rows.iter().zip(&shown) {
        let mut line = String::new();
        let mut column = 0;
        for (i, (cell, text)) in row.iter().zip(texts).enumerate() {
            let is_last = i + 1 == N;
            let room = screen.width.filter(|_| is_last);
            let text = match room {
                Some(all) => clip(text, all.saturating_sub(column)),
                None => Cow::Borrowed(text.as_str()),
            };
            let length = text.chars().count();
            let blank = " ".repeat(widths[i].saturating_sub(length));
            let painted = screen.paint(cell.colour, &text);
            line += &match (cell.is_number, is_last) {
                (true, true) => format!("{blank}{painted}"),
                (true, false) => format!("{blank}{painted}  "),
                (false, true) => painted,
                (false, false) => format!("{painted}{blank}  "),
            };
            column += widths[i] + 2;
        }
        lines.push(line.trim_end().to_owned());
    }
    lines
}

/// A table to stdout, in full.
pub(super) fn table<const N: usize, C: Clone + Into<Cell>>(rows: &[[C; N]]) -> anyhow::Result<()> {
    let wide = Screen {
        width: None,
        ..*Screen::stdout()
    };
    write(rows, &wide)
}

/// A table to stdout, each row of which is one line of a terminal.
pub(super) fn list<const N: usize, C: Clone + Into<Cell>>(rows: &[[C; N]]) -> anyhow::Result<()> {
    write(rows, Screen::stdout())
}

fn write<const N: usize, C: Clone + Into<Cell>>(
    rows: &[[C; N]],
    screen: &Screen,
) -> anyhow::Result<()> {
    let cells: Vec<[Cell; N]> = rows.iter().map(|row| row.clone().map(Into::into)).collect();
    for line in align(&cells, screen) {
        print(&line)?;
    }
    Ok(())
}

/// As much of a text as has room, with a sign that it goes on. At least a few letters.
fn clip(text: &str, room: usize) -> Cow<'_, str> {
    let room = room.max(8);
    match text.char_indices().nth(room) {
        None => text.into(),
        Some(_) => {
            let kept: String = text.chars().take(room - 1).collect();
            format!("{kept}…").into()
        }
    }
}

/// Whether there is a line of progress on the terminal, below everything else.
static PROGRESS: Mutex<bool> = Mutex::new(false);

/// Shows a line of progress in place of the one before.
pub(super) fn show_progress(text: &str) {
    let mut shown = PROGRESS.lock();
    let room = Screen::stderr().width.unwrap_or(80).saturating_sub(1);
    let text = one_line(text);
    // Nobody to be told of a terminal that is gone.
    let _ = write!(io::stderr(), "\r{}\x1b[K", clip(&text, room));
    *shown = true;
}

/// Takes the line of progress away.
pub(super) fn clear_progress() {
    let mut shown = PROGRESS.lock();
    if *shown {
        let _ = write!(io::stderr(), "\r\x1b[K");
        *shown = false;
    }
}

/// One line to stdout.
pub(super) fn print(line: &str) -> io::Result<()> {
    clear_progress();
    writeln!(io::stdout().lock(), "{line}")
}

/// One object in one line to stdout. Escaped beyond what JSON demands: it may go to a terminal.
pub(super) fn print_json(object: &impl Serialize) -> anyhow::Result<()> {
    print(&escape_json(&serde_json::to_string(object)?))?;
    Ok(())
}

/// Something that went wrong, to stderr, in one line.
pub(super) fn complain(text: &str) {
    clear_progress();
    // Without a stderr there is nobody to complain to.
    let _ = writeln!(io::stderr(), "crab: {}", one_line(text));
}

/// Characters that act instead of showing: controls, and what changes the direction of text or has no
/// width.
fn acts(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}'
            | '\u{feff}')
}

/// Text from a sandbox or a user, safe for a terminal (D19). Lines stay lines.
pub(super) fn printable(text: &str) -> String {
    escape(text, |c| c == '\n')
}

/// The same in one line.
pub(super) fn one_line(text: &str) -> String {
    let lines: Vec<&str> = text.trim_end().split('\n').map(str::trim_end).collect();
    escape(&lines.join("; "), |_| false)
}

/// A name from a sandbox: whatever bytes it has, it stays one word of a line, and none looks like another.
pub(super) fn name(bytes: &[u8]) -> String {
    let mut text = String::new();
    for chunk in bytes.utf8_chunks() {
        let valid = chunk.valid().replace('\\', "\\\\");
        text += &escape(&valid, |_| false);
        for byte in chunk.invalid() {
            // Writing to a String cannot fail.
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}

fn escape(text: &str, keeps: impl Fn(char) -> bool) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match acts(c) && !keeps(c) {
            true => out.extend(c.escape_default()),
            false => out.push(c),
        }
    }
    out
}

/// Outside of strings JSON as we write it has no such character.
fn escape_json(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        match acts(c) {
            // All of them have four digits.
            true => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            false => out.push(c),
        }
    }
    out
}

/// A size for people.
pub(super) fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut size = n as f64;
    let mut unit = 0;
    while size >= 1024.0 && unit + 1 < UNITS.len() {
        size /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{n} B"),
        _ => format!("{size:.1} {}", UNITS[unit]),
    }
}

/// A time for people, in the two digits that matter.
pub(super) fn span(micros: u64) -> String {
    let seconds = micros / 1_000_000;
    match (micros, seconds) {
        (..1_000, _) => format!("{micros} µs"),
        (..10_000, _) => format!("{:.1} ms", micros as f64 / 1000.0),
        (..1_000_000, _) => format!("{:.0} ms", micros as f64 / 1000.0),
        (_, ..100) => format!("{:.1} s", micros as f64 / 1e6),
        (_, ..6_000) => format!("{} min", seconds / 60),
        (_, ..172_800) => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// How many of what.
pub(super) fn count(n: u64, one: &str, many: &str) -> String {
    match n {
        1 => format!("1 {one}"),
        n => format!("{n} {many}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminal_escapes_are_shown_not_sent() {
        assert_eq!(printable("a\x1b[31mb\nc"), "a\\u{1b}[31mb\nc");
        assert_eq!(one_line("a\r\nb\u{9b}2J\n"), "a; b\\u{9b}2J");
        // What is read from right to left would look like another name.
        assert_eq!(one_line("gpj.\u{202e}exe"), "gpj.\\u{202e}exe");
        assert_eq!(
            escape_json("{\"a\":\"\u{7f}\u{9b}é\u{202e}\"}"),
            "{\"a\":\"\\u007f\\u009bé\\u202e\"}"
        );
    }

    #[test]
    fn names_of_any_bytes_stay_apart() {
        let all: [&[u8]; 5] = [
            b"a\nb",
            b"a\\nb",
            b"\xff\xfe",
            b"\\xff\\xfe",
            "é ü".as_bytes(),
        ];
        let shown = all.map(name);
        assert_eq!(
            shown,
            ["a\\nb", "a\\\\nb", "\\xff\\xfe", "\\\\xff\\\\xfe", "é ü"]
        );
    }

    #[test]
    fn columns_are_aligned_and_numbers_stand_at_the_right() {
        let row = |n: &str, a: &str, b: &str| [Cell::number(n), a.into(), b.into()];
        let rows = [row("1", "one", ""), row("10", "é", "the last")];
        assert_eq!(
            align(&rows, &Screen::PLAIN),
            [" 1  one", "10  é    the last"]
        );
        let narrow = Screen {
            colours: false,
            width: Some(17),
        };
        let long = [row("1", "one", "a note that is long")];
        assert_eq!(align(&long, &narrow), ["1  one  a note t…"]);
    }

    #[test]
    fn colours_do_not_count_as_width() {
        let screen = Screen {
            colours: true,
            width: None,
        };
        let rows = [
            [Cell::new("yes", Colour::Good), "x".into()],
            ["unknown".into(), "y".into()],
        ];
        assert_eq!(
            align(&rows, &screen),
            ["\x1b[32myes\x1b[0m      x", "unknown  y"]
        );
    }

    #[test]
    fn sizes_have_one_decimal() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(3 << 40), "3.0 TiB");
    }

    #[test]
    fn times_are_in_the_unit_that_is_read_best() {
        let spans = [0, 999, 1_500, 34_400, 1_500_000, 99_000_000, 600_000_000];
        let said = spans.map(span);
        assert_eq!(
            said,
            [
                "0 µs", "999 µs", "1.5 ms", "34 ms", "1.5 s", "99.0 s", "10 min"
            ]
        );
        assert_eq!(span(3 * 86_400_000_000), "3 d");
    }
}
