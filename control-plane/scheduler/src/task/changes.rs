//! Single pieces of a peer come, go, are wanted and on their way: the sets and the counts follow.

use super::{Mode, Task};

/// Changes of one piece of one peer. All do nothing but the peer's own set while the task isn't active.
impl Task {
    /// The peer has the piece, for others too.
    pub fn gain(&mut self, slot: u32, piece: u32) {
        let Some(peer) = self.peer_mut(slot) else { return };
        let (zone, muted) = (peer.zone, peer.muted);
        if peer.have.insert(piece) {
            self.held[slot as usize] += 1;
            if !muted && self.active {
                self.note_copy(slot, zone, piece, true);
            }
        }
    }

    pub fn lose(&mut self, slot: u32, piece: u32) {
        let Some(peer) = self.peer_mut(slot) else { return };
        let (zone, muted) = (peer.zone, peer.muted);
        if peer.have.remove(piece) {
            self.held[slot as usize] -= 1;
            if !muted && self.active {
                self.note_copy(slot, zone, piece, false);
            }
        }
    }

    /// What the peer has doesn't count, or counts again.
    pub fn mute(&mut self, slot: u32, muted: bool) {
        let Some(peer) = self.peer_mut(slot) else { return };
        if peer.muted == muted {
            return;
        }
        peer.muted = muted;
        let (zone, have) = (peer.zone, peer.have.clone());
        if self.active {
            have.iter().for_each(|piece| self.note_copy(slot, zone, piece, !muted));
        }
    }

    /// A piece that was on its way to the peer is there. Its copy is counted already.
    pub fn land(&mut self, slot: u32, piece: u32) {
        let Some(peer) = self.peer_mut(slot) else { return };
        let (zone, muted, new) = (peer.zone, peer.muted, peer.have.insert(piece));
        if !new {
            self.held[slot as usize] -= 1;
        }
        if muted || !new {
            self.count_copy(zone, piece, false);
        } else {
            self.note_holder(slot, piece, true);
        }
    }

    pub(super) fn note_copy(&mut self, slot: u32, zone: usize, piece: u32, holds: bool) {
        self.count_copy(zone, piece, holds);
        self.note_holder(slot, piece, holds);
    }

    fn note_holder(&mut self, slot: u32, piece: u32, holds: bool) {
        if self.mode == Mode::Direct {
            self.holding.set(piece, slot, holds);
        }
        let holders = &mut self.holders[piece as usize];
        *holders = if holds { *holders + 1 } else { *holders - 1 };
        if *holders == u32::from(holds) {
            (0..self.zones.len()).for_each(|zone| self.note_import(zone, piece));
        }
    }

    /// The peer begins or stops to wait for somebody to get the piece from.
    pub fn set_lack(&mut self, slot: u32, piece: u32, lacks: bool) {
        let Some(peer) = self.peer_mut(slot) else { return };
        let changed = if lacks { peer.lack.insert(piece) } else { peer.lack.remove(piece) };
        let zone = peer.zone;
        if !changed || !self.active {
            return;
        }
        if self.mode == Mode::Direct {
            self.lacking.set(piece, slot, lacks);
        }
        let add = |count: &mut u32| *count = if lacks { *count + 1 } else { *count - 1 };
        add(&mut self.lackers[piece as usize]);
        let of_zone = &mut self.zones[zone];
        add(&mut of_zone.lackers[piece as usize]);
        if of_zone.lackers[piece as usize] == u32::from(lacks) {
            if lacks {
                of_zone.lacked.insert(piece);
            } else {
                of_zone.lacked.remove(piece);
            }
        }
        self.note_orphan(piece);
        self.note_import(zone, piece);
    }

    /// A piece that a peer lacks is on its way to it.
    pub fn begin(&mut self, slot: u32, zone: usize, piece: u32) {
        self.held[slot as usize] += 1;
        self.count_copy(zone, piece, true);
        self.set_lack(slot, piece, false);
    }

    /// It isn't any more, and hasn't arrived.
    pub fn give_up(&mut self, slot: u32, zone: usize, piece: u32) {
        self.held[slot as usize] -= 1;
        self.count_copy(zone, piece, false);
    }

    /// The number of copies in a zone changes by one.
    fn count_copy(&mut self, zone: usize, piece: u32, more: bool) {
        let copies = &mut self.copies[piece as usize];
        if more {
            *copies += 1;
            self.zones[zone].rarity.add(piece);
        } else {
            *copies -= 1;
            self.zones[zone].rarity.remove(piece);
        }
        self.note_orphan(piece);
        self.note_import(zone, piece);
    }

    fn note_orphan(&mut self, piece: u32) {
        let orphan = self.lackers[piece as usize] > 0 && self.copies[piece as usize] == 0;
        if orphan != self.orphans.contains(piece) {
            if orphan {
                self.orphans.insert(piece);
            } else {
                self.orphans.remove(piece);
            }
        }
    }

    fn note_import(&mut self, zone: usize, piece: u32) {
        let held = self.holders[piece as usize] > 0;
        let zone = &mut self.zones[zone];
        let import = held && zone.lackers[piece as usize] > 0 && zone.rarity.copies(piece) == 0;
        if import != zone.imports.contains(piece) {
            if import {
                zone.imports.insert(piece);
            } else {
                zone.imports.remove(piece);
            }
        }
    }
}
