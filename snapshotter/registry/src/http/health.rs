//! Which endpoints failed lately, so that a dead mirror isn't waited for at every request.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use reqwest::Url;

/// For so long an ill endpoint is asked last.
const ILL: Duration = Duration::from_secs(30);
const ENDPOINTS: usize = 1024;

#[derive(Default)]
pub struct Health(Mutex<HashMap<String, Instant>>);

impl Health {
    pub fn failed(&self, base: &Url) {
        let mut ill = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if ill.len() >= ENDPOINTS {
            ill.clear();
        }
        ill.insert(base.to_string(), Instant::now());
    }

    pub fn answered(&self, base: &Url) {
        let mut ill = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !ill.is_empty() {
            ill.remove(base.as_str());
        }
    }

    pub fn is_ill(&self, base: &Url) -> bool {
        let ill = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ill.get(base.as_str()).is_some_and(|since| since.elapsed() < ILL)
    }
}
