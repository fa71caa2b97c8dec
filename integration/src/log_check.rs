//! What a program under test mustn't log.

use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;

use crate::scenario::Scenario;

/// Fails its scenario if the program logged a warning or an error that wasn't expected.
#[derive(Clone, Debug, Default)]
pub struct LogCheck {
    expected: Arc<Mutex<Vec<String>>>,
}

impl LogCheck {
    /// Of the program called `name`, whose log is JSON.
    pub fn of(scenario: &Scenario, name: &str) -> Self {
        let check = Self::default();
        let expected = Arc::clone(&check.expected);
        let log = scenario.logs().join(format!("{name}.log"));
        let name = name.to_owned();
        scenario.check_at_end(move || {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            let expected = expected.lock().unwrap_or_else(PoisonError::into_inner);
            let surprises: Vec<&str> = complaints(&text)
                .filter(|line| !expected.iter().any(|part| line.contains(part.as_str())))
                .collect();
            anyhow::ensure!(surprises.is_empty(), "{name} logged:\n{}", surprises.join("\n"));
            Ok(())
        });
        check
    }

    /// Warnings and errors that contain `part` are part of what is tested.
    pub fn expect(&self, part: &str) {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner).push(part.to_owned());
    }
}

/// Who warns of waits for the database: where other tests keep the disk busy, it takes seconds.
const SLOW_DATABASE: [&str; 2] = ["sqlx::pool::acquire", "sqlx::query"];

/// The lines of a log that a person should look at; what isn't JSON (a panic) is one too.
fn complaints(log: &str) -> impl Iterator<Item = &str> {
    log.lines().filter(|line| match serde_json::from_str::<Value>(line) {
        Ok(value) => {
            matches!(value["level"].as_str(), Some("WARN" | "ERROR"))
                && !value["target"].as_str().is_some_and(|target| SLOW_DATABASE.contains(&target))
        }
        Err(_) => !line.trim().is_empty(),
    })
}

#[cfg(test)]
mod tests {
    use super::complaints;

    #[test]
    fn warnings_errors_and_panics_are_complaints() {
        let log = "{\"level\":\"INFO\"}\n{\"level\":\"WARN\"}\n\nthread 'main' panicked\n{\"level\":\"ERROR\"}\n\
                   {\"level\":\"WARN\",\"target\":\"sqlx::query\"}\n";
        assert_eq!(
            complaints(log).collect::<Vec<_>>(),
            ["{\"level\":\"WARN\"}", "thread 'main' panicked", "{\"level\":\"ERROR\"}"]
        );
    }
}
