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

/// How sqlx warns of waits for the database: where other tests keep the disk busy, it takes seconds.
const SLOW_DATABASE: [&str; 2] = [
    "acquired connection, but time to acquire exceeded slow threshold",
    "slow statement: execution time exceeded alert threshold",
];

/// The lines of a log that a person should look at; what isn't JSON (a panic) is one too.
fn complaints(log: &str) -> impl Iterator<Item = &str> {
    log.lines().filter(|line| match serde_json::from_str::<Value>(line) {
        Ok(value) => {
            let message = value["fields"]["message"].as_str().unwrap_or_default();
            matches!(value["level"].as_str(), Some("WARN" | "ERROR"))
                && !SLOW_DATABASE.contains(&message)
        }
        Err(_) => !line.trim().is_empty(),
    })
}

#[cfg(test)]
mod tests {
    use super::{SLOW_DATABASE, complaints};

    #[test]
    fn warnings_errors_and_panics_are_complaints() {
        let log = "{\"level\":\"INFO\"}\n{\"level\":\"WARN\"}\n\nthread 'main' panicked\n{\"level\":\"ERROR\"}\n";
        assert_eq!(
            complaints(log).collect::<Vec<_>>(),
            ["{\"level\":\"WARN\"}", "thread 'main' panicked", "{\"level\":\"ERROR\"}"]
        );
    }

    #[test]
    fn a_slow_database_is_no_complaint() {
        let of =
            |message: &str| format!(r#"{{"level":"WARN","fields":{{"message":"{message}"}}}}"#);
        for message in SLOW_DATABASE {
            assert_eq!(complaints(&of(message)).count(), 0);
        }
        assert_eq!(complaints(&of("connection lost")).count(), 1);
    }
}
