//! The form of a result: ours, the yardstick's, their ratio, and how far to trust it.
//!
//! Invariant: `ratio` is ours / yardstick, whichever is better.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;

use serde::Serialize;

use crate::Failure;
use crate::machine::Machine;

/// Which way is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// Rates.
    Higher,
    /// Times and sizes.
    Lower,
}

/// How the rounds are made one figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pick {
    /// The middle one.
    Median,
    /// The yardstick at its best; ours is still the median.
    BestYardstick,
}

/// One line of a result.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The benchmark, with its variant.
    pub name: String,
    /// Our figure: the median round.
    pub ours: f64,
    /// The yardstick's figure.
    pub yardstick: f64,
    /// What was measured as the yardstick.
    pub yardstick_is: String,
    /// Of both figures.
    pub unit: &'static str,
    /// `ours / yardstick`.
    pub ratio: f64,
    /// Which way is good.
    pub better: Better,
    /// The ratio aimed at, if any.
    pub aim: Option<f64>,
    /// Rounds of each, interleaved.
    pub rounds: usize,
    /// Least and most of all rounds.
    pub spread: Spread,
    /// Measured with less work than the benchmark defines.
    pub reduced: bool,
    /// Further figures.
    pub detail: BTreeMap<String, serde_json::Value>,
    /// Where.
    pub machine: Machine,
}

/// Least and most of all rounds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Spread {
    /// Ours.
    pub ours: [f64; 2],
    /// The yardstick's.
    pub yardstick: [f64; 2],
}

/// Figures of the rounds, before they become a [`Row`].
#[derive(Clone, Debug)]
pub struct Rounds {
    /// Of both figures.
    pub unit: &'static str,
    /// Which way is good.
    pub better: Better,
    /// What was measured as the yardstick.
    pub yardstick_is: &'static str,
    /// Ours, by round.
    pub ours: Vec<f64>,
    /// The yardstick's, by round.
    pub yardstick: Vec<f64>,
}

impl Rounds {
    /// Makes the row; there must have been a round.
    pub fn row(&self, name: impl Into<String>, pick: Pick, machine: &Machine) -> Row {
        let ours = median(&self.ours);
        let [least, most] = extremes(&self.yardstick);
        let yardstick = match (pick, self.better) {
            (Pick::Median, _) => median(&self.yardstick),
            (Pick::BestYardstick, Better::Higher) => most,
            (Pick::BestYardstick, Better::Lower) => least,
        };
        Row {
            name: name.into(),
            ours,
            yardstick,
            yardstick_is: self.yardstick_is.to_owned(),
            unit: self.unit,
            ratio: ours / yardstick,
            better: self.better,
            aim: None,
            rounds: self.ours.len(),
            spread: Spread {
                ours: extremes(&self.ours),
                yardstick: extremes(&self.yardstick),
            },
            reduced: false,
            detail: BTreeMap::new(),
            machine: machine.clone(),
        }
    }
}

impl Row {
    /// Names the ratio aimed at.
    pub fn aim(mut self, ratio: f64) -> Row {
        self.aim = Some(ratio);
        self
    }

    /// Marks the row as measured with less work than the benchmark defines.
    pub fn reduced(mut self, reduced: bool) -> Row {
        self.reduced = reduced;
        self
    }

    /// Adds a figure.
    pub fn with(mut self, key: &str, value: impl Into<serde_json::Value>) -> Row {
        self.detail.insert(key.to_owned(), value.into());
        self
    }

    /// The row as one line of JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a row has string keys and finite figures or null")
    }

    fn is_met(&self) -> Option<bool> {
        self.aim.map(|aim| match self.better {
            Better::Higher => self.ratio >= aim,
            Better::Lower => self.ratio <= aim,
        })
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let aim = match (self.aim, self.is_met()) {
            (Some(aim), Some(true)) => format!(", aim {aim}: met"),
            (Some(aim), _) => format!(", aim {aim}: NOT met"),
            _ => String::new(),
        };
        let better = match self.better {
            Better::Higher => "higher is better",
            Better::Lower => "lower is better",
        };
        writeln!(
            f,
            "{}{}: ratio {:.3} ({better}{aim})",
            self.name,
            if self.reduced { " [reduced]" } else { "" },
            self.ratio,
        )?;
        writeln!(
            f,
            "  ours      {:10.2} {:8} [{:.2} to {:.2}] in {} rounds",
            self.ours, self.unit, self.spread.ours[0], self.spread.ours[1], self.rounds
        )?;
        write!(
            f,
            "  yardstick {:10.2} {:8} [{:.2} to {:.2}] {}",
            self.yardstick,
            self.unit,
            self.spread.yardstick[0],
            self.spread.yardstick[1],
            self.yardstick_is
        )?;
        for (key, value) in &self.detail {
            write!(f, "\n  {key}: {value}")?;
        }
        Ok(())
    }
}

/// The middle figure; of an even number, the mean of the middle two.
pub fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len().is_multiple_of(2) {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    } else {
        sorted[middle]
    }
}

fn extremes(figures: &[f64]) -> [f64; 2] {
    figures
        .iter()
        .fold([f64::INFINITY, f64::NEG_INFINITY], |[least, most], x| {
            [least.min(*x), most.max(*x)]
        })
}

/// Appends rows to `bench/results/rows.jsonl` of the source tree that this program was built from.
///
/// # Errors
/// The file cannot be written.
pub fn append_to_results(rows: &[Row]) -> Result<(), Failure> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("results");
    let file = dir.join("rows.jsonl");
    let append = || {
        std::fs::create_dir_all(&dir)?;
        let mut out = OpenOptions::new().create(true).append(true).open(&file)?;
        rows.iter()
            .try_for_each(|row| writeln!(out, "{}", row.to_json()))
    };
    append().map_err(Failure::io(file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounds(better: Better) -> Rounds {
        Rounds {
            unit: "s",
            better,
            yardstick_is: "cp",
            ours: vec![9.0, 2.0, 4.0],
            yardstick: vec![8.0, 1.0, 2.0],
        }
    }

    #[test]
    fn the_median_is_taken_against_the_median_or_the_best() {
        let machine = Machine::look(Path::new("/"));
        let row = rounds(Better::Lower).row("x", Pick::Median, &machine);
        assert_eq!((row.ours, row.yardstick, row.ratio), (4.0, 2.0, 2.0));
        assert_eq!(row.spread.ours, [2.0, 9.0]);
        let row = rounds(Better::Lower).row("x", Pick::BestYardstick, &machine);
        assert_eq!((row.yardstick, row.is_met()), (1.0, None));
        let row = rounds(Better::Higher).row("x", Pick::BestYardstick, &machine);
        assert_eq!((row.yardstick, row.ratio), (8.0, 0.5));
        assert_eq!(row.clone().aim(0.5).is_met(), Some(true));
        assert_eq!(row.aim(0.6).is_met(), Some(false));
        assert_eq!(median(&[1.0, 4.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn the_keys_of_the_contract_are_there() {
        let machine = Machine::look(Path::new("/"));
        let row = rounds(Better::Lower).row("x", Pick::Median, &machine);
        let value: serde_json::Value = serde_json::from_str(&row.to_json()).unwrap();
        for key in [
            "name",
            "ours",
            "yardstick",
            "yardstick_is",
            "unit",
            "ratio",
            "better",
            "rounds",
            "spread",
            "machine",
        ] {
            assert!(!value[key].is_null(), "{key}");
        }
        assert_eq!(value["better"], "lower");
    }
}
