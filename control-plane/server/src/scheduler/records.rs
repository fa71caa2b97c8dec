//! Who says how a blob decodes, and what follows when they disagree. Pure.
//!
//! A statement is a signed [`IndexRecord`] whose signature has been checked. Only one piece table can be
//! right for a blob, so two tables mean that somebody lies: nobody is given either until it is decided. A
//! node that read a layer to its end publishes what it found, so honest nodes outvote a liar in time.
//!
//! - The side that a new signer joins wins if it has more signers than all others together and at
//!   least two, or if it has a seed and the others have none. The losers are convicted.
//! - Several nodes that joined by one token count as one signer: they may be one party.
//! - Of one party, and where there are too many, a seed's statement is kept, then the one that is believed for longer.
//!
//! All soft state: statements live as long as a connected node holds what they name.

use std::collections::{BTreeMap, BTreeSet};

use skimmer_identity::PeerId;
use skimmer_proto::control::IndexRecord;
use skimmer_proto::{Digest, TaskId};
use skimmer_scheduler::NodeId;

/// Statements kept for one table. A few signers are enough to be believed.
const MAX_STATEMENTS: usize = 16;
/// Tables between which a task's statements may be divided.
const MAX_TABLES: usize = 8;

/// SHA-256 of the token by which a node joined.
pub type Party = [u8; 32];

/// A checked record.
#[derive(Clone, Debug, PartialEq)]
pub struct Statement {
    pub table: Digest,
    pub signer: PeerId,
    pub seed: bool,
    /// Of the signer.
    pub party: Party,
    /// When the signer's certificate ends (Unix seconds), and with it what its word is worth.
    pub not_after: i64,
    pub record: IndexRecord,
}

/// What follows from a statement.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Nothing that others need to hear of.
    Known,
    /// There is one table, and one signer more for it.
    Agreed,
    /// It contradicts others, for the first time: these tables are not to be used.
    Disputed(Vec<Digest>),
    /// It was decided who lied, and about which tables.
    Convicted { tables: Vec<Digest>, signers: Vec<PeerId> },
}

#[derive(Debug, Default)]
pub struct Records {
    tasks: BTreeMap<TaskId, Entry>,
}

#[derive(Debug, Default)]
struct Entry {
    tables: BTreeMap<Digest, Side>,
    /// Nodes that wait for records.
    finders: BTreeSet<NodeId>,
}

#[derive(Debug, Default)]
struct Side {
    statements: Vec<Statement>,
    holders: BTreeSet<NodeId>,
}

impl Statement {
    /// A seed's counts more, then what is believed for longer.
    fn worth(&self) -> (bool, i64) {
        (self.seed, self.not_after)
    }

    fn is_better_than(&self, other: &Self) -> bool {
        self.worth() > other.worth()
    }
}

impl Side {
    fn parties(&self) -> usize {
        self.statements.iter().map(|s| s.party).collect::<BTreeSet<_>>().len()
    }

    fn has_seed(&self) -> bool {
        self.statements.iter().any(|statement| statement.seed)
    }
}

impl Records {
    /// Node `from` holds what `statement` names.
    pub fn publish(&mut self, task: TaskId, from: NodeId, statement: Statement) -> Outcome {
        let entry = self.tasks.entry(task).or_default();
        let table = statement.table;
        let divided = entry.tables.len();
        if divided >= MAX_TABLES && !entry.tables.contains_key(&table) {
            return Outcome::Known;
        }
        let side = entry.tables.entry(table).or_default();
        side.holders.insert(from);
        let said =
            |known: &Statement| known.signer == statement.signer || known.party == statement.party;
        if let Some(known) = side.statements.iter_mut().find(|known| said(known)) {
            if known.signer == statement.signer || statement.is_better_than(known) {
                *known = statement;
            }
            return Outcome::Known;
        }
        if side.statements.len() >= MAX_STATEMENTS {
            // Those who said the others may have gone long ago.
            let worst = side.statements.iter_mut().min_by_key(|known| known.worth());
            if let Some(worst) = worst.filter(|worst| statement.is_better_than(worst)) {
                *worst = statement;
            }
            return Outcome::Known;
        }
        side.statements.push(statement);
        match entry.tables.len() {
            1 => Outcome::Agreed,
            now => match entry.convict(&table) {
                Some(outcome) => outcome,
                None if now > divided => Outcome::Disputed(entry.tables.keys().copied().collect()),
                None => Outcome::Known,
            },
        }
    }

    /// What is agreed on: the records, and who holds what they name. From now on `finder` is told of news.
    pub fn find(&mut self, task: TaskId, finder: NodeId) -> (Vec<IndexRecord>, Vec<NodeId>) {
        self.tasks.entry(task).or_default().finders.insert(finder);
        self.agreed(&task)
    }

    /// As [`Self::find`] answers.
    pub fn agreed(&self, task: &TaskId) -> (Vec<IndexRecord>, Vec<NodeId>) {
        let tables = self.tasks.get(task).map(|entry| &entry.tables);
        let Some((_, side)) = tables.filter(|t| t.len() == 1).and_then(BTreeMap::first_key_value)
        else {
            return (Vec::new(), Vec::new());
        };
        let records = side.statements.iter().map(|statement| statement.record.clone()).collect();
        (records, side.holders.iter().copied().collect())
    }

    /// Who is told of a task's news.
    pub fn finders(&self, task: &TaskId) -> impl Iterator<Item = NodeId> {
        self.tasks.get(task).into_iter().flat_map(|entry| entry.finders.iter().copied())
    }

    pub fn knows(&self, task: &TaskId) -> bool {
        self.tasks.contains_key(task)
    }

    /// `finder` needs no news of the task any more.
    pub fn withdraw(&mut self, task: &TaskId, finder: NodeId) {
        if let Some(entry) = self.tasks.get_mut(task) {
            entry.finders.remove(&finder);
        }
        self.forget();
    }

    /// The node has gone, and with it what only it held.
    pub fn left(&mut self, node: NodeId) {
        for entry in self.tasks.values_mut() {
            entry.finders.remove(&node);
            for side in entry.tables.values_mut() {
                side.holders.remove(&node);
            }
        }
        self.forget();
    }

    /// What the peer signed doesn't count any more.
    pub fn block(&mut self, peer: &PeerId) {
        for side in self.tasks.values_mut().flat_map(|entry| entry.tables.values_mut()) {
            side.statements.retain(|statement| statement.signer != *peer);
        }
        self.forget();
    }

    fn forget(&mut self) {
        self.tasks.retain(|_, entry| {
            entry.tables.retain(|_, side| !side.holders.is_empty() && !side.statements.is_empty());
            !entry.tables.is_empty() || !entry.finders.is_empty()
        });
    }
}

impl Entry {
    /// Whether those who say `table` win over all others, who then are removed.
    fn convict(&mut self, table: &Digest) -> Option<Outcome> {
        let side = self.tables.get(table)?;
        let others = || self.tables.iter().filter(|(other, _)| *other != table);
        let against: usize = others().map(|(_, side)| side.parties()).sum();
        let by_number = side.parties() >= 2 && side.parties() > against;
        let by_seed = side.has_seed() && !others().any(|(_, side)| side.has_seed());
        if !by_number && !by_seed {
            return None;
        }
        let tables: Vec<Digest> = others().map(|(table, _)| *table).collect();
        let honest: BTreeSet<PeerId> = side.statements.iter().map(|s| s.signer).collect();
        let signers = others().flat_map(|(_, side)| side.statements.iter().map(|s| s.signer));
        let signers = signers.filter(|signer| !honest.contains(signer)).collect::<BTreeSet<_>>();
        self.tables.retain(|other, _| other == table);
        Some(Outcome::Convicted { tables, signers: signers.into_iter().collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TASK: TaskId = TaskId::from_bytes([1; 32]);

    fn table(n: u8) -> Digest {
        Digest::from_bytes([n; 32])
    }

    fn peer(n: u8) -> PeerId {
        PeerId::from_public_key([n; 32])
    }

    /// Signer and party `n` says table `t`; a seed from 100 on.
    fn says(n: u8, t: u8) -> Statement {
        let record = IndexRecord { blob: vec![n], ..IndexRecord::default() };
        let (signer, party) = (peer(n), [n; 32]);
        Statement { table: table(t), signer, seed: n >= 100, party, not_after: 0, record }
    }

    fn run(steps: &[(u8, u8)]) -> (Records, Outcome) {
        let mut records = Records::default();
        let mut last = Outcome::Known;
        for (n, t) in steps {
            last = records.publish(TASK, NodeId((*n).into()), says(*n, *t));
        }
        (records, last)
    }

    #[test]
    fn who_is_believed() {
        let disputed =
            |tables: &[u8]| Outcome::Disputed(tables.iter().map(|t| table(*t)).collect());
        let convicted = |t: u8, signers: &[u8]| Outcome::Convicted {
            tables: vec![table(t)],
            signers: signers.iter().map(|n| peer(*n)).collect(),
        };
        let rows: [(&[(u8, u8)], Outcome, usize); 12] = [
            (&[(1, 7)], Outcome::Agreed, 1),
            (&[(1, 7), (1, 7)], Outcome::Known, 1),
            (&[(1, 7), (2, 7)], Outcome::Agreed, 2),
            (&[(1, 7), (2, 8)], disputed(&[7, 8]), 0),
            (&[(1, 7), (2, 8), (3, 8)], convicted(7, &[1]), 2),
            (&[(1, 7), (2, 8), (3, 7)], convicted(8, &[2]), 2),
            (&[(1, 7), (2, 7), (3, 8)], disputed(&[7, 8]), 0),
            (&[(1, 7), (2, 7), (3, 8), (4, 8)], Outcome::Known, 0),
            (&[(1, 7), (2, 7), (3, 8), (4, 8), (5, 8)], convicted(7, &[1, 2]), 3),
            (&[(1, 7), (100, 8)], convicted(7, &[1]), 1),
            (&[(100, 7), (2, 8)], disputed(&[7, 8]), 0),
            (&[(100, 7), (2, 8), (3, 8)], convicted(7, &[100]), 2),
        ];
        for (steps, expected, records) in rows {
            let (state, last) = run(steps);
            assert_eq!(last, expected, "{steps:?}");
            assert_eq!(state.agreed(&TASK).0.len(), records, "{steps:?}");
        }
    }

    #[test]
    fn one_party_is_one_voice() {
        let (mut records, _) = run(&[(1, 7)]);
        for n in 2..9 {
            let same_token = Statement { party: [1; 32], ..says(n, 7) };
            assert_eq!(records.publish(TASK, NodeId(n.into()), same_token), Outcome::Known);
        }
        let (found, holders) = records.agreed(&TASK);
        assert_eq!((found.len(), holders.len()), (1, 8), "but each holds it");
    }

    #[test]
    fn a_statement_goes_with_the_last_who_holds_its_table() {
        let (mut records, _) = run(&[(1, 7)]);
        // Node 2 got the table by the record of peer 1, and says so.
        records.publish(TASK, NodeId(2), says(1, 7));
        assert_eq!(records.find(TASK, NodeId(9)).1, [NodeId(1), NodeId(2)]);
        records.left(NodeId(1));
        assert_eq!(records.agreed(&TASK).0.len(), 1);
        records.left(NodeId(2));
        assert_eq!(records.agreed(&TASK).0.len(), 0);
        assert_eq!(records.finders(&TASK).collect::<Vec<_>>(), [NodeId(9)]);
        records.withdraw(&TASK, NodeId(9));
        assert!(!records.knows(&TASK));
    }

    #[test]
    fn a_blocked_signer_has_said_nothing() {
        let (mut records, _) = run(&[(1, 7), (2, 8)]);
        records.block(&peer(1));
        let (found, holders) = records.agreed(&TASK);
        assert_eq!((found, holders), (vec![says(2, 8).record], vec![NodeId(2)]));
    }

    #[test]
    fn statements_are_bounded() {
        let mut records = Records::default();
        for n in 0..90 {
            records.publish(TASK, NodeId(n.into()), says(n, n));
        }
        assert_eq!(records.tasks[&TASK].tables.len(), MAX_TABLES);
        let (records, _) = run(&(0..90).map(|n| (n, 7)).collect::<Vec<_>>());
        assert_eq!(records.agreed(&TASK).0.len(), MAX_STATEMENTS);
    }

    #[test]
    fn who_is_believed_for_longer_takes_the_place_of_who_has_gone() {
        let (mut records, _) = run(&(0..40).map(|n| (n, 7)).collect::<Vec<_>>());
        let mut say = |statement: Statement| {
            let record = statement.record.clone();
            assert_eq!(records.publish(TASK, NodeId(1), statement), Outcome::Known);
            let (found, _) = records.agreed(&TASK);
            assert_eq!(found.len(), MAX_STATEMENTS);
            found.contains(&record)
        };
        assert!(!say(Statement { not_after: -1, ..says(50, 7) }));
        assert!(say(Statement { not_after: 9, ..says(51, 7) }));
        let [sooner, later] = [5, 20].map(|not_after| {
            // Of one party.
            Statement { not_after, party: [51; 32], ..says(52, 7) }
        });
        assert!(!say(sooner));
        assert!(say(later));
        assert!(say(Statement { not_after: -9, ..says(100, 7) }), "a seed's");
    }
}
