//! The store in one SQLite file.
//!
//! Owns: the file, created 0600 since it holds the private keys of the CAs; its migrations.
//!
//! Invariants:
//! - A token's use and the node that it lets in are written in one transaction, which takes the
//!   write lock first: two nodes can't share the last use.
//! - A commit is on disk when it returns (`synchronous = FULL`).

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use sqlx::migrate::Migrator;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteRow,
    SqliteSynchronous,
};
use sqlx::{Row as _, SqliteConnection};

use crate::model::{
    Authority, Cluster, Enrolment, Event, Joined, Node, Refusal, Role, Scheduler, Token, TokenHash,
};
use crate::store::{Error, Store};

static MIGRATIONS: Migrator = sqlx::migrate!();

/// How long a transaction waits for another process's.
const BUSY: Duration = Duration::from_secs(10);
const CONNECTIONS: u32 = 4;

const NODE: &str = "SELECT * FROM nodes WHERE peer = ?";

pub struct Sqlite {
    pool: SqlitePool,
}

impl Sqlite {
    /// Opens the database file `path`, which is created if there is none, and brings it to this version's form.
    pub async fn open(path: &Path) -> Result<Self, Error> {
        let owned = || path.to_owned();
        restrict(path).map_err(|source| Error::Create { path: owned(), source })?;
        // SQLite's own locks don't span the migrations of two processes that start at once, and of
        // two that turn to the write-ahead log at once one is told that the database is locked.
        let turn = take_turn(path.with_added_extension("lock")).await;
        let turn = turn.map_err(|source| Error::Create { path: owned(), source })?;
        let options = SqliteConnectOptions::new()
            .filename(path)
            .foreign_keys(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(BUSY);
        let pool = SqlitePoolOptions::new()
            .max_connections(CONNECTIONS)
            .connect_with(options)
            .await
            .map_err(|source| Error::Open { path: owned(), source })?;
        MIGRATIONS.run(&pool).await.map_err(|source| Error::Migrate { path: owned(), source })?;
        drop(turn);
        Ok(Self { pool })
    }

    /// Folds the write-ahead log into the file and closes it.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}

/// SQLite gives the mode of the database file to its `-wal` and `-shm` too.
fn restrict(path: &Path) -> std::io::Result<()> {
    let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
    file.set_permissions(std::fs::Permissions::from_mode(0o600))
}

/// Until the file is closed, nobody else gets here.
async fn take_turn(path: PathBuf) -> std::io::Result<File> {
    let take = move || {
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
        file.lock().map(|()| file)
    };
    tokio::task::spawn_blocking(take).await.map_err(std::io::Error::other)?
}

fn failed(doing: &'static str) -> impl FnOnce(sqlx::Error) -> Error {
    move |source| Error::Query { doing, source }
}

#[async_trait]
impl Store for Sqlite {
    async fn root(&self, proposed: Authority) -> Result<Authority, Error> {
        let doing = failed("keep the root CA");
        let kept = async {
            sqlx::query(
                "INSERT INTO root (id, certificate, private_key) VALUES (1, ?, ?) ON CONFLICT DO NOTHING",
            )
            .bind(proposed.certificate)
            .bind(proposed.private_key)
            .execute(&self.pool)
            .await?;
            let row = sqlx::query("SELECT certificate, private_key FROM root")
                .fetch_one(&self.pool)
                .await?;
            authority(&row)
        };
        kept.await.map_err(doing)
    }

    async fn add_cluster(&self, cluster: &Cluster) -> Result<bool, Error> {
        let done = sqlx::query(
            "INSERT INTO clusters (id, name, certificate, private_key, repositories, created) \
             VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        )
        .bind(&cluster.id)
        .bind(&cluster.name)
        .bind(&cluster.authority.certificate)
        .bind(&cluster.authority.private_key)
        .bind(cluster.repositories.join("\n"))
        .bind(cluster.created)
        .execute(&self.pool)
        .await
        .map_err(failed("add a cluster"))?;
        Ok(done.rows_affected() > 0)
    }

    async fn clusters(&self) -> Result<Vec<Cluster>, Error> {
        let select = "SELECT * FROM clusters ORDER BY name";
        let rows = sqlx::query(select).fetch_all(&self.pool).await;
        let clusters = rows.and_then(|rows| rows.iter().map(cluster).collect());
        clusters.map_err(failed("list clusters"))
    }

    async fn set_repositories(
        &self,
        cluster: &str,
        repositories: &[String],
    ) -> Result<bool, Error> {
        let done = sqlx::query("UPDATE clusters SET repositories = ? WHERE id = ?")
            .bind(repositories.join("\n"))
            .bind(cluster)
            .execute(&self.pool)
            .await
            .map_err(failed("set a cluster's repositories"))?;
        Ok(done.rows_affected() > 0)
    }

    async fn add_token(&self, token: &Token) -> Result<(), Error> {
        sqlx::query(
            "INSERT INTO tokens (hash, cluster, role, expires, uses_left) VALUES (?, ?, ?, ?, ?)",
        )
        .bind(&token.hash[..])
        .bind(&token.cluster)
        .bind(token.role.name())
        .bind(token.expires)
        .bind(token.uses_left)
        .execute(&self.pool)
        .await
        .map_err(failed("add a token"))?;
        Ok(())
    }

    async fn enrol(&self, token: &TokenHash, node: &Enrolment, now: i64) -> Result<Joined, Error> {
        let doing = || failed("enrol a node");
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await.map_err(doing())?;
        let joined = enrol(&mut transaction, token, node, now).await?;
        if let Joined::In(_) = joined {
            transaction.commit().await.map_err(doing())?;
        }
        Ok(joined)
    }

    async fn drop_tokens(&self, now: i64) -> Result<u64, Error> {
        let done = sqlx::query("DELETE FROM tokens WHERE expires < ?")
            .bind(now)
            .execute(&self.pool)
            .await
            .map_err(failed("forget expired tokens"))?;
        Ok(done.rows_affected())
    }

    async fn node(&self, peer: &str) -> Result<Option<Node>, Error> {
        let row = sqlx::query(NODE).bind(peer).fetch_optional(&self.pool).await;
        row.map_err(failed("look a node up"))?.as_ref().map(read_node).transpose()
    }

    async fn nodes(&self, cluster: Option<&str>) -> Result<Vec<Node>, Error> {
        let rows = sqlx::query(
            "SELECT * FROM nodes WHERE cluster = ? OR ? IS NULL ORDER BY cluster, name, peer",
        )
        .bind(cluster)
        .bind(cluster)
        .fetch_all(&self.pool)
        .await
        .map_err(failed("list nodes"))?;
        rows.iter().map(read_node).collect()
    }

    async fn renew(&self, peer: &str, expires: i64) -> Result<Option<Node>, Error> {
        let row = sqlx::query(
            "UPDATE nodes SET expires = ? WHERE peer = ? AND revoked IS NULL \
             RETURNING *",
        )
        .bind(expires)
        .bind(peer)
        .fetch_optional(&self.pool)
        .await
        .map_err(failed("renew a node's certificate"))?;
        row.as_ref().map(read_node).transpose()
    }

    async fn revoke(&self, peer: &str, reason: &str) -> Result<Option<Node>, Error> {
        let row = sqlx::query(
            "UPDATE nodes SET revoked = ? WHERE peer = ? AND revoked IS NULL \
             RETURNING *",
        )
        .bind(reason)
        .bind(peer)
        .fetch_optional(&self.pool)
        .await
        .map_err(failed("revoke a node"))?;
        row.as_ref().map(read_node).transpose()
    }

    async fn revoked(&self, end: i64) -> Result<Vec<Node>, Error> {
        let rows = sqlx::query(
            "SELECT * FROM nodes WHERE revoked IS NOT NULL AND expires > ? \
             ORDER BY cluster, name, peer",
        )
        .bind(end)
        .fetch_all(&self.pool)
        .await
        .map_err(failed("list revoked nodes"))?;
        rows.iter().map(read_node).collect()
    }

    async fn beat(
        &self,
        scheduler: &Scheduler,
        now_ms: i64,
        since_ms: i64,
    ) -> Result<Vec<Scheduler>, Error> {
        let doing = || failed("note that a scheduler runs");
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await.map_err(doing())?;
        sqlx::query(
            "INSERT INTO schedulers (id, address, seen) VALUES (?, ?, ?) \
             ON CONFLICT (id) DO UPDATE SET address = excluded.address, seen = excluded.seen",
        )
        .bind(&scheduler.id)
        .bind(&scheduler.address)
        .bind(now_ms)
        .execute(&mut *transaction)
        .await
        .map_err(doing())?;
        sqlx::query("DELETE FROM schedulers WHERE seen < ? OR (address = ? AND id <> ?)")
            .bind(since_ms)
            .bind(&scheduler.address)
            .bind(&scheduler.id)
            .execute(&mut *transaction)
            .await
            .map_err(doing())?;
        let live = live_schedulers(&mut transaction, since_ms).await.map_err(doing())?;
        transaction.commit().await.map_err(doing())?;
        Ok(live)
    }

    async fn schedulers(&self, since_ms: i64) -> Result<Vec<Scheduler>, Error> {
        let doing = || failed("list schedulers");
        let mut connection = self.pool.acquire().await.map_err(doing())?;
        live_schedulers(&mut connection, since_ms).await.map_err(doing())
    }

    async fn retire(&self, id: &str) -> Result<(), Error> {
        let gone = sqlx::query("DELETE FROM schedulers WHERE id = ?").bind(id);
        gone.execute(&self.pool).await.map_err(failed("note that a scheduler ended"))?;
        Ok(())
    }

    async fn add_event(&self, event: &Event) -> Result<(), Error> {
        sqlx::query("INSERT INTO events (at, cluster, what) VALUES (?, ?, ?)")
            .bind(event.at)
            .bind(&event.cluster)
            .bind(&event.what)
            .execute(&self.pool)
            .await
            .map_err(failed("add an event"))?;
        Ok(())
    }

    async fn events(&self, cluster: Option<&str>, limit: u32) -> Result<Vec<Event>, Error> {
        let rows = sqlx::query(
            "SELECT at, cluster, what FROM events WHERE cluster = ? OR ? IS NULL \
             ORDER BY id DESC LIMIT ?",
        )
        .bind(cluster)
        .bind(cluster)
        .bind(limit)
        .fetch_all(&self.pool)
        .await;
        let event = |row: &SqliteRow| {
            Ok(Event { at: row.try_get(0)?, cluster: row.try_get(1)?, what: row.try_get(2)? })
        };
        let events = rows.and_then(|rows| rows.iter().rev().map(event).collect());
        events.map_err(failed("list events"))
    }
}

async fn live_schedulers(
    connection: &mut SqliteConnection,
    since_ms: i64,
) -> sqlx::Result<Vec<Scheduler>> {
    let rows = sqlx::query("SELECT id, address FROM schedulers WHERE seen >= ? ORDER BY id")
        .bind(since_ms)
        .fetch_all(connection)
        .await?;
    let read = |row: &SqliteRow| {
        Ok(Scheduler { id: row.try_get("id")?, address: row.try_get("address")? })
    };
    rows.iter().map(read).collect()
}

/// Within a transaction that holds the write lock.
async fn enrol(
    transaction: &mut SqliteConnection,
    hash: &TokenHash,
    asking: &Enrolment,
    now: i64,
) -> Result<Joined, Error> {
    let doing = || failed("enrol a node");
    let found = sqlx::query("SELECT * FROM tokens WHERE hash = ?")
        .bind(&hash[..])
        .fetch_optional(&mut *transaction)
        .await
        .map_err(doing())?;
    let Some(row) = found else { return Ok(Joined::Refused(Refusal::UnknownToken)) };
    let token = read_token(&row)?;
    let known = sqlx::query(NODE).bind(&asking.peer).fetch_optional(&mut *transaction).await;
    let known = known.map_err(doing())?.as_ref().map(read_node).transpose()?;
    let takes_use = match token.admit(known.as_ref(), now) {
        Ok(takes_use) => takes_use,
        Err(refusal) => return Ok(Joined::Refused(refusal)),
    };
    if takes_use {
        sqlx::query("UPDATE tokens SET uses_left = uses_left - 1 WHERE hash = ?")
            .bind(&hash[..])
            .execute(&mut *transaction)
            .await
            .map_err(doing())?;
    }
    let row = sqlx::query(
        "INSERT INTO nodes (peer, cluster, name, zone, role, token, enrolled, expires, revoked) \
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL) \
         ON CONFLICT (peer) DO UPDATE SET name = excluded.name, zone = excluded.zone, \
         role = excluded.role, token = excluded.token, enrolled = excluded.enrolled, \
         expires = excluded.expires \
         RETURNING *",
    )
    .bind(&asking.peer)
    .bind(&token.cluster)
    .bind(&asking.name)
    .bind(&asking.zone)
    .bind(token.role.name())
    .bind(&hash[..])
    .bind(now)
    .bind(asking.expires)
    .fetch_one(&mut *transaction)
    .await
    .map_err(doing())?;
    read_node(&row).map(Joined::In)
}

fn authority(row: &SqliteRow) -> sqlx::Result<Authority> {
    Ok(Authority {
        certificate: row.try_get("certificate")?,
        private_key: row.try_get("private_key")?,
    })
}

fn cluster(row: &SqliteRow) -> sqlx::Result<Cluster> {
    let repositories: String = row.try_get("repositories")?;
    Ok(Cluster {
        id: row.try_get("id")?,
        name: row.try_get("name")?,
        authority: authority(row)?,
        repositories: repositories.lines().map(str::to_owned).collect(),
        created: row.try_get("created")?,
    })
}

fn read_token(row: &SqliteRow) -> Result<Token, Error> {
    let failed = |source| Error::Query { doing: "read a token", source };
    Ok(Token {
        hash: hash(row, "tokens", "hash")?,
        cluster: row.try_get("cluster").map_err(failed)?,
        role: role(row, "tokens")?,
        expires: row.try_get("expires").map_err(failed)?,
        uses_left: row.try_get("uses_left").map_err(failed)?,
    })
}

fn read_node(row: &SqliteRow) -> Result<Node, Error> {
    let failed = |source| Error::Query { doing: "read a node", source };
    Ok(Node {
        peer: row.try_get("peer").map_err(failed)?,
        cluster: row.try_get("cluster").map_err(failed)?,
        name: row.try_get("name").map_err(failed)?,
        zone: row.try_get("zone").map_err(failed)?,
        role: role(row, "nodes")?,
        token: hash(row, "nodes", "token")?,
        enrolled: row.try_get("enrolled").map_err(failed)?,
        expires: row.try_get("expires").map_err(failed)?,
        revoked: row.try_get("revoked").map_err(failed)?,
    })
}

fn role(row: &SqliteRow, table: &'static str) -> Result<Role, Error> {
    let name: String = row.try_get("role").map_err(failed("read a role"))?;
    Role::from_name(&name).ok_or(Error::Row { table, value: name })
}

fn hash(row: &SqliteRow, table: &'static str, column: &str) -> Result<TokenHash, Error> {
    let bytes: Vec<u8> = row.try_get(column).map_err(failed("read a token's hash"))?;
    let length = bytes.len();
    bytes.try_into().map_err(|_| Error::Row { table, value: format!("a hash of {length} bytes") })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance;

    #[tokio::test]
    async fn conforms() {
        conformance::check(async || {
            let dir = tempfile::tempdir().unwrap();
            let store = Sqlite::open(&dir.path().join("control.db")).await.unwrap();
            (store, dir)
        })
        .await;
    }

    #[tokio::test]
    async fn survives_a_restart_in_files_of_its_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.db");
        let authority = conformance::authority(1);
        let store = Sqlite::open(&path).await.unwrap();
        store.root(authority.clone()).await.unwrap();
        for entry in std::fs::read_dir(dir.path()).unwrap() {
            let entry = entry.unwrap();
            let mode = entry.metadata().unwrap().permissions().mode() & 0o777;
            assert_eq!(mode, 0o600, "{:?}", entry.file_name());
        }
        // Not closed: as after a crash.
        let again = Sqlite::open(&path).await.unwrap();
        assert_eq!(again.root(conformance::authority(2)).await.unwrap(), authority);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn several_may_open_a_new_one_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.db");
        let mut opening = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let path = path.clone();
            opening.spawn(async move { Sqlite::open(&path).await.map(drop) });
        }
        for opened in opening.join_all().await {
            opened.unwrap();
        }
    }

    #[tokio::test]
    async fn a_database_of_a_later_version_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.db");
        let store = Sqlite::open(&path).await.unwrap();
        let later = "INSERT INTO _sqlx_migrations VALUES (9999, 'later', 0, 1, x'00', 0)";
        sqlx::query(later).execute(&store.pool).await.unwrap();
        store.close().await;
        assert!(matches!(Sqlite::open(&path).await, Err(Error::Migrate { .. })));
    }
}
