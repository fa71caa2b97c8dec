//! What a layer is, and what is to be done next with it. Pure: events in, actions out, time is an
//! argument.
//!
//! Invariants:
//! - One piece of work at a time: an action that starts work is given only when none is under way.
//! - A layer that nobody wants any more is forgotten when its work ends, not in the middle.
//! - A failure is told to those who wait, and to those who ask within [`RETRY_AFTER`]; whoever asks
//!   later starts a new attempt.

use std::time::Duration;

/// How long a failure is answered from memory.
pub const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Time since some start.
pub type Now = Duration;

/// A layer's life. `E` is why an attempt failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State<E> {
    /// Nobody wants it.
    Absent,
    /// It is being looked up on disk.
    Opening,
    /// It is being fetched whole, its index under construction.
    PullThrough,
    /// It can be mounted; some bytes are missing.
    Lazy,
    /// Every byte is on disk, and all of it has been verified.
    Local,
    Failed {
        error: E,
        at: Now,
    },
}

impl<E> State<E> {
    /// Whether work is under way whose end will change the state.
    pub const fn is_working(&self) -> bool {
        matches!(self, Self::Opening | Self::PullThrough)
    }

    /// Whether the layer can be mounted.
    pub const fn is_ready(&self) -> bool {
        matches!(self, Self::Lazy | Self::Local)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event<E> {
    /// Somebody needs the layer.
    Wanted,
    /// Nobody needs it any more.
    Released,
    /// The disk had no usable index.
    NoIndex,
    /// Index and data file are open; `complete` if no byte is missing and all were verified.
    Ready { complete: bool },
    /// The last missing byte has come and everything was verified.
    Completed,
    /// Bytes that had been verified are missing again.
    Lost,
    /// The work under way, or the verification of a complete layer, came to nothing.
    Failed(E),
}

/// What the caller does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Nothing,
    /// Look for an index on disk; report `NoIndex`, `Ready` or `Failed`.
    Open,
    /// Fetch the blob whole; report `Ready` or `Failed`.
    PullThrough,
    /// Unmount it and close its files.
    Close,
}

/// One layer's state machine.
#[derive(Clone, Debug)]
pub struct Machine<E> {
    state: State<E>,
    /// Whether somebody needs the layer.
    wanted: bool,
}

impl<E> Default for Machine<E> {
    fn default() -> Self {
        Self { state: State::Absent, wanted: false }
    }
}

impl<E> Machine<E> {
    pub const fn state(&self) -> &State<E> {
        &self.state
    }

    pub fn apply(&mut self, now: Now, event: Event<E>) -> Action {
        match event {
            Event::Wanted => self.want(now),
            Event::Released => self.release(),
            Event::NoIndex => self.to(State::PullThrough, Action::PullThrough),
            Event::Ready { complete: false } => self.finish(State::Lazy),
            Event::Ready { complete: true } => self.finish(State::Local),
            Event::Completed if self.state.is_ready() => self.to(State::Local, Action::Nothing),
            Event::Lost if matches!(self.state, State::Local) => {
                self.to(State::Lazy, Action::Nothing)
            }
            Event::Completed | Event::Lost => Action::Nothing,
            Event::Failed(_) if !self.wanted => self.to(State::Absent, Action::Close),
            Event::Failed(error) => {
                let action = if self.state.is_ready() { Action::Close } else { Action::Nothing };
                self.to(State::Failed { error, at: now }, action)
            }
        }
    }

    fn want(&mut self, now: Now) -> Action {
        self.wanted = true;
        match &self.state {
            State::Absent => self.to(State::Opening, Action::Open),
            State::Failed { at, .. } if now.saturating_sub(*at) >= RETRY_AFTER => {
                self.to(State::Opening, Action::Open)
            }
            _ => Action::Nothing,
        }
    }

    fn release(&mut self) -> Action {
        self.wanted = false;
        if self.state.is_working() {
            return Action::Nothing;
        }
        self.to(State::Absent, Action::Close)
    }

    fn finish(&mut self, state: State<E>) -> Action {
        if self.wanted {
            self.to(state, Action::Nothing)
        } else {
            self.to(State::Absent, Action::Close)
        }
    }

    fn to(&mut self, state: State<E>, action: Action) -> Action {
        self.state = state;
        action
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{
        Just, Strategy, any, prop_assert, prop_assert_eq, prop_oneof, proptest,
    };

    type Step = (u64, Event<&'static str>, Action, State<&'static str>);

    fn check(steps: &[Step]) {
        let mut machine = Machine::default();
        for (n, (ms, event, action, state)) in steps.iter().enumerate() {
            let now = Duration::from_millis(*ms);
            assert_eq!(machine.apply(now, event.clone()), *action, "step {n}");
            assert_eq!(machine.state(), state, "step {n}");
        }
    }

    const fn failed(ms: u64) -> State<&'static str> {
        State::Failed { error: "no", at: Duration::from_millis(ms) }
    }

    #[test]
    fn with_an_index_it_is_lazy_until_complete() {
        check(&[
            (0, Event::Wanted, Action::Open, State::Opening),
            (1, Event::Wanted, Action::Nothing, State::Opening),
            (2, Event::Ready { complete: false }, Action::Nothing, State::Lazy),
            (3, Event::Wanted, Action::Nothing, State::Lazy),
            (4, Event::Completed, Action::Nothing, State::Local),
            (5, Event::Lost, Action::Nothing, State::Lazy),
            (6, Event::Lost, Action::Nothing, State::Lazy),
            (7, Event::Completed, Action::Nothing, State::Local),
            (8, Event::Released, Action::Close, State::Absent),
            (9, Event::Completed, Action::Nothing, State::Absent),
            (10, Event::Lost, Action::Nothing, State::Absent),
        ]);
    }

    #[test]
    fn without_an_index_it_is_pulled_through() {
        check(&[
            (0, Event::Wanted, Action::Open, State::Opening),
            (1, Event::NoIndex, Action::PullThrough, State::PullThrough),
            (2, Event::Ready { complete: true }, Action::Nothing, State::Local),
        ]);
    }

    #[test]
    fn a_failure_is_remembered_for_a_moment_then_retried() {
        check(&[
            (0, Event::Wanted, Action::Open, State::Opening),
            (5, Event::Failed("no"), Action::Nothing, failed(5)),
            (1004, Event::Wanted, Action::Nothing, failed(5)),
            (1005, Event::Wanted, Action::Open, State::Opening),
            (1006, Event::Ready { complete: false }, Action::Nothing, State::Lazy),
            (2000, Event::Failed("no"), Action::Close, failed(2000)),
        ]);
    }

    #[test]
    fn work_goes_on_when_nobody_wants_it_and_serves_whoever_comes_back() {
        let start = [
            (0, Event::Wanted, Action::Open, State::Opening),
            (1, Event::NoIndex, Action::PullThrough, State::PullThrough),
            (2, Event::Released, Action::Nothing, State::PullThrough),
        ];
        let end = (9, Event::Ready { complete: true }, Action::Close, State::Absent);
        check(&[start.to_vec(), vec![end]].concat());
        let end = (9, Event::Failed("no"), Action::Close, State::Absent);
        check(&[start.to_vec(), vec![end]].concat());
        let again = (3, Event::Wanted, Action::Nothing, State::PullThrough);
        let end = (9, Event::Ready { complete: true }, Action::Nothing, State::Local);
        check(&[start.to_vec(), vec![again, end]].concat());
    }

    fn event() -> impl Strategy<Value = Event<u8>> {
        prop_oneof![
            Just(Event::Wanted),
            Just(Event::Released),
            Just(Event::NoIndex),
            any::<bool>().prop_map(|complete| Event::Ready { complete }),
            Just(Event::Completed),
            Just(Event::Lost),
            Just(Event::Failed(0)),
        ]
    }

    proptest! {
        /// Work is started only when none is under way, and the caller reports only what it did.
        #[test]
        fn one_piece_of_work_at_a_time(events in proptest::collection::vec((0..700u64, event()), 0..60)) {
            let mut machine = Machine::default();
            let (mut now, mut working) = (0, false);
            for (pause, event) in events {
                let ends = matches!(event, Event::NoIndex | Event::Ready { .. } | Event::Failed(_));
                if ends && !working {
                    continue;
                }
                let is_end = ends && event != Event::NoIndex;
                if event == Event::NoIndex && *machine.state() != State::Opening {
                    continue;
                }
                now += pause;
                let action = machine.apply(Duration::from_millis(now), event);
                if is_end {
                    working = false;
                }
                if action == Action::Open {
                    prop_assert!(!working);
                    working = true;
                }
                prop_assert_eq!(machine.state().is_working(), working);
            }
        }
    }
}
