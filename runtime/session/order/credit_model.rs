//! A pure model of credits: two ranks run launch orders of one lane, and every pair of orders, in every interleaving,
//! neither overwrites a slot that is still to be read nor comes to a standstill.
//!
//! Which orders are legal is asked of [`RingOrder`], the code that refuses calls. What a half does is modelled: a send
//! half posts what its rank has consumed, then waits for the peer's credit of the step N before, then writes its slot
//! at the peer; a receive half waits for its slot and reads it. The sends of two ranks are in the same order, as the
//! protocol demands of members; their receives need not be.

use std::collections::HashMap;

use super::RingOrder;

const MAX_RING: usize = 4;
const MAX_HALVES: usize = 12;

/// One half, by operation and step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Half {
    Send(usize, u64),
    Receive(usize, u64),
}

/// Every order of halves that one lane accepts, of `steps` steps of the first `num_ops` operations. A combine is sent
/// once its dispatch, in order, was received.
fn legal_orders(ring: u32, num_ops: usize, steps: u64) -> Vec<Vec<Half>> {
    let mut found = Vec::new();
    let rings = [RingOrder::new(ring), RingOrder::new(ring)];
    extend(&rings, num_ops, steps, &mut Vec::new(), &mut found);
    found
}

fn extend(
    rings: &[RingOrder; 2],
    num_ops: usize,
    steps: u64,
    order: &mut Vec<Half>,
    found: &mut Vec<Vec<Half>>,
) {
    let received = rings[0].sent() - rings[0].owed();
    let mut choices: Vec<Half> = Vec::new();
    for (op, ring) in rings.iter().enumerate().take(num_ops) {
        let most = if op == 0 { steps } else { received };
        choices.extend(ring.next_send().ok().filter(|&seq| seq <= most).map(|seq| Half::Send(op, seq)));
        choices.extend(ring.unreceived.iter().map(|&seq| Half::Receive(op, seq)));
    }
    if choices.is_empty() {
        assert_eq!(order.len() as u64, 2 * steps * num_ops as u64, "a legal order can always be finished");
        found.push(order.clone());
    }
    for half in choices {
        let mut rings = rings.clone();
        match half {
            Half::Send(op, seq) => assert_eq!(rings[op].launched_send(), seq),
            Half::Receive(op, seq) => assert!(rings[op].launched_receive(seq)),
        }
        order.push(half);
        extend(&rings, num_ops, steps, order, found);
        order.pop();
    }
}

/// What the model leaves out, to show that it would be missed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    None,
    /// A slot is written without its credit.
    NoCredits,
    /// Credits are posted after the wait for the peer's, not before it.
    CreditsLast,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Good,
    Overwritten,
    Stuck,
}

/// One word per operation and slot: the last step that it speaks of.
type Words = [[u64; MAX_RING]; 2];

/// One rank: how far it is, and what its peer can see of it.
#[derive(Clone, Copy, Default)]
struct RankState {
    next: usize,
    /// Has the send half at `next` posted its credits?
    opened: bool,
    written: Words,
    consumed: Words,
    credits: Words,
}

struct Model<'a> {
    ring: u64,
    flaw: Flaw,
    orders: [&'a [Half]; 2],
    seen: [[bool; 2 * (MAX_HALVES + 1)]; 2 * (MAX_HALVES + 1)],
}

impl Model<'_> {
    fn slot(&self, seq: u64) -> usize {
        // CAST: a remainder of at most 4.
        (seq % self.ring) as usize
    }

    /// Takes one rank a step further: `None` if it must wait, else whether the step was safe.
    fn step(&self, ranks: &mut [RankState; 2], r: usize) -> Option<bool> {
        let half = *self.orders[r].get(ranks[r].next)?;
        let peer = ranks[1 - r];
        let me = &mut ranks[r];
        match half {
            Half::Send(..) if !me.opened => {
                me.opened = true;
                if self.flaw != Flaw::CreditsLast {
                    me.credits = me.consumed;
                }
                Some(true)
            }
            Half::Send(op, seq) => {
                let (slot, before) = (self.slot(seq), seq.saturating_sub(self.ring));
                if self.flaw != Flaw::NoCredits && peer.credits[op][slot] < before {
                    return None;
                }
                let is_read = peer.consumed[op][slot] >= before;
                me.credits = if self.flaw == Flaw::CreditsLast { me.consumed } else { me.credits };
                me.written[op][slot] = seq;
                (me.opened, me.next) = (false, me.next + 1);
                Some(is_read)
            }
            Half::Receive(op, seq) => {
                let slot = self.slot(seq);
                if peer.written[op][slot] < seq {
                    return None;
                }
                let is_own = peer.written[op][slot] == seq;
                me.consumed[op][slot] = seq;
                me.next += 1;
                Some(is_own)
            }
        }
    }

    /// All interleavings from here. Where both ranks are says everything about the words, so each place is seen once.
    fn run(&mut self, ranks: [RankState; 2]) -> Outcome {
        let [a, b] = ranks.map(|rank| 2 * rank.next + usize::from(rank.opened));
        if std::mem::replace(&mut self.seen[a][b], true) {
            return Outcome::Good;
        }
        let mut moved = false;
        for r in 0..2 {
            let mut after = ranks;
            let Some(is_safe) = self.step(&mut after, r) else { continue };
            moved = true;
            let outcome = if is_safe { self.run(after) } else { Outcome::Overwritten };
            if outcome != Outcome::Good {
                return outcome;
            }
        }
        let ended = (0..2).all(|r| ranks[r].next == self.orders[r].len());
        if moved || ended { Outcome::Good } else { Outcome::Stuck }
    }
}

/// Runs every pair of legal orders whose sends agree; returns how many there are, or what the first bad one came to.
fn run_all(ring: u32, num_ops: usize, steps: u64, flaw: Flaw) -> Result<u64, Outcome> {
    let mut by_sends: HashMap<Vec<Half>, Vec<Vec<Half>>> = HashMap::new();
    for order in legal_orders(ring, num_ops, steps) {
        let sends = order.iter().copied().filter(|half| matches!(half, Half::Send(..))).collect();
        by_sends.entry(sends).or_default().push(order);
    }
    let mut num_pairs = 0;
    for orders in by_sends.values() {
        for (i, one) in orders.iter().enumerate() {
            for other in &orders[i..] {
                let seen = [[false; 2 * (MAX_HALVES + 1)]; 2 * (MAX_HALVES + 1)];
                let mut model = Model { ring: ring.into(), flaw, orders: [one, other], seen };
                match model.run([RankState::default(); 2]) {
                    Outcome::Good => num_pairs += 1,
                    bad => return Err(bad),
                }
            }
        }
    }
    Ok(num_pairs)
}

/// Rings, operations and steps small enough for every order: dispatches alone, then combines among them.
const SIZES: [(u32, usize, u64); 6] = [(1, 1, 5), (2, 1, 5), (3, 1, 5), (4, 1, 5), (1, 2, 3), (2, 2, 3)];

#[test]
fn every_legal_order_ends_and_overwrites_nothing() {
    for (ring, num_ops, steps) in SIZES {
        let pairs = run_all(ring, num_ops, steps, Flaw::None);
        assert!(matches!(pairs, Ok(1..)), "ring {ring}, {num_ops} operations, {steps} steps: {pairs:?}");
    }
}

#[test]
fn without_credits_a_slot_is_overwritten() {
    for (ring, num_ops, steps) in SIZES.into_iter().filter(|&(ring, _, steps)| u64::from(ring) < steps) {
        assert_eq!(run_all(ring, num_ops, steps, Flaw::NoCredits), Err(Outcome::Overwritten), "ring {ring}");
    }
}

#[test]
fn a_send_that_waits_before_it_posts_credits_may_wait_for_ever() {
    for ring in 1..=4 {
        assert_eq!(run_all(ring, 1, 5, Flaw::CreditsLast), Err(Outcome::Stuck), "ring {ring}");
    }
}
