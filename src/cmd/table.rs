//! The tables that commands print: columns as wide as their widest text, two spaces between them. What would steer a
//! terminal is escaped.

use crate::log::printable;

/// How a column is laid out; those that are not named are [`Column::Left`].
#[derive(Clone, Copy)]
pub(super) enum Column {
    /// Texts begin below one another.
    Left,
    /// They end below one another, as numbers do.
    Right,
    /// Not wider than this, whatever is in it: what is longer moves the rest of its line.
    AtMost(usize),
}

/// A text in a table.
pub(super) struct Cell {
    text: String,
    colour: Option<&'static str>,
}

impl Cell {
    /// With the code of a colour (ECMA-48, 8.3.117), if any.
    pub(super) fn coloured(self, colour: Option<&'static str>) -> Self {
        Cell { colour, ..self }
    }
}

impl<T: AsRef<str>> From<T> for Cell {
    fn from(text: T) -> Self {
        Cell { text: printable(text.as_ref()).into_owned(), colour: None }
    }
}

/// The lines of a table.
pub(super) fn table(columns: &[Column], rows: &[Vec<Cell>]) -> String {
    let mut widths: Vec<usize> = Vec::new();
    let column = |i: usize| columns.get(i).copied().unwrap_or(Column::Left);
    for (i, cell) in rows.iter().flat_map(|row| row.iter().enumerate()) {
        let width = match column(i) {
            Column::AtMost(most) => cell.text.chars().count().min(most),
            Column::Left | Column::Right => cell.text.chars().count(),
        };
        widths.resize(widths.len().max(i + 1), 0);
        widths[i] = widths[i].max(width);
    }
    let mut out = String::new();
    for row in rows {
        let mut line = String::new();
        for (i, Cell { text, colour }) in row.iter().enumerate() {
            let pad = " ".repeat(widths[i].saturating_sub(text.chars().count()));
            let text = colour.map_or(text.clone(), |code| format!("\x1b[{code}m{text}\x1b[0m"));
            match column(i) {
                Column::Right => line.push_str(&format!("{pad}{text}  ")),
                Column::Left | Column::AtMost(_) => line.push_str(&format!("{text}{pad}  ")),
            }
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_text() {
        let rows: Vec<Vec<Cell>> = [["NAME", "N", "VALUE", "END"], ["ä\n", "100", "too long", ""]]
            .map(|row| row.into_iter().map(Cell::from).collect())
            .into();
        let columns = [Column::Left, Column::Right, Column::AtMost(3)];
        assert_eq!(table(&columns, &rows), "NAME    N  VALUE  END\nä\\n   100  too long\n");
        let red = vec![Cell::from("a").coloured(Some("31")), Cell::from("b")];
        assert_eq!(table(&[], &[red, vec!["aa".into()]]), "\x1b[31ma\x1b[0m   b\naa\n");
    }
}
