//! `docs/errors.md`: the table of errors, which the tests take their expectations from.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};

/// A row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Its name; a case has the same.
    pub name: String,
    /// The message, with `…` where something varies.
    pub text: String,
}

impl Row {
    /// Whether `message` contains the text, whatever stands for each `…`.
    #[must_use]
    pub fn matches(&self, message: &str) -> bool {
        let mut rest = message;
        self.text.split('…').map(str::trim).filter(|p| !p.is_empty()).all(|part| match rest.find(part) {
            Some(at) => {
                rest = &rest[at + part.len()..];
                true
            }
            None => false,
        })
    }
}

/// Reads the table's rows: lines of the form ``| `name` | what happened | `text` |``.
pub fn rows() -> Result<Vec<Row>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/errors.md");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let rows: Vec<Row> = text.lines().filter_map(row).collect();
    ensure!(!rows.is_empty(), "no rows in {}", path.display());
    Ok(rows)
}

fn row(line: &str) -> Option<Row> {
    let cells: Vec<&str> = line.strip_prefix("| `")?.strip_suffix(" |")?.split(" | ").collect();
    let [name, _, text] = cells[..] else { return None };
    let text = text.trim().trim_matches('`').trim();
    Some(Row { name: name.trim().trim_end_matches('`').into(), text: text.replace("\\|", "|") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_read_and_matched() {
        let row = row("| `no-kernel` | The kernel is missing. | `cannot read … kernel … No such file` |").unwrap();
        assert_eq!(row.name, "no-kernel");
        assert!(row.matches("ctr: cannot read the guest kernel \"/x\": No such file or directory"));
        assert!(!row.matches("ctr: No such file: cannot read the kernel"), "the order counts");
    }
}
