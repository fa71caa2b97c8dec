//! What is measured and how it is reported.

use serde_json::{Value, json};
use skimmer_integration::scenario::Scenario;

/// A number that is promised, and how to get it.
pub struct Figure {
    pub name: &'static str,
    pub what: &'static str,
    pub unit: &'static str,
    pub bar: Bar,
    pub aim: f64,
    /// What skimmer is compared with, if with anything.
    pub against: Option<&'static str>,
    pub measure: fn(&Bench<'_>) -> anyhow::Result<Outcome>,
}

/// On which side of it the value has to be.
pub enum Bar {
    AtMost(f64),
    AtLeast(f64),
}

/// What a measurement works with.
pub struct Bench<'a> {
    pub scenario: &'a Scenario,
    /// How often each side is measured.
    pub runs: u32,
}

/// A measured figure.
pub struct Outcome {
    /// From medians over `runs`.
    pub value: f64,
    pub runs: Vec<Value>,
    /// What was measured on, and with which settings.
    pub settings: Value,
}

impl Figure {
    /// For `--list`.
    pub fn line(&self) -> String {
        let (sign, bar) = self.bar.parts();
        format!(
            "{:13} {sign} {bar} {}, aim {}: {}",
            self.name,
            self.unit.trim(),
            self.aim,
            self.what
        )
    }

    /// The JSON object of a measured figure.
    pub fn report(&self, outcome: &Outcome) -> Value {
        let (_, bar) = self.bar.parts();
        let met = match self.bar {
            Bar::AtMost(bar) => outcome.value <= bar,
            Bar::AtLeast(bar) => outcome.value >= bar,
        };
        json!({
            "figure": self.name, "value": rounded(outcome.value), "unit": self.unit, "bar": bar, "aim": self.aim,
            "met": met, "what": self.what, "against": self.against, "runs": outcome.runs,
            "settings": outcome.settings,
        })
    }
}

impl Bar {
    fn parts(&self) -> (&'static str, f64) {
        match *self {
            Self::AtMost(bar) => ("≤", bar),
            Self::AtLeast(bar) => ("≥", bar),
        }
    }
}

/// The middle of `values`; of the two middle ones, their mean. NaN if there are none.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

/// To three decimals, as nothing here is measured better than that.
pub fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::{median, rounded};

    #[test]
    fn medians() {
        for (values, expected) in
            [(vec![3.0], 3.0), (vec![9.0, 1.0, 2.0], 2.0), (vec![4.0, 1.0, 2.0, 9.0], 3.0)]
        {
            assert_eq!(rounded(median(values.clone())), expected, "{values:?}");
        }
        assert!(median(Vec::new()).is_nan());
    }
}
