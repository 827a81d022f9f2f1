//! The least that an operation of a store could cost on this machine: the same bytes without a store.
//!
//! Owns its map, its file, its connections and the thread that answers on loopback; all end with it.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::mpsc;

use ibex::error::{Error, OsError};
use ibex::time::Stopwatch;
use ibex_metadata::name::RecordName;
use ibex_metadata::url::StoreUrl;

use crate::cli::CliError;

/// Bytes of a ping.
const PING_LEN: usize = 64;

/// What an operation is compared with.
pub(super) struct Limits {
    map: HashMap<RecordName, Box<[u8]>>,
    names: Vec<RecordName>,
    value: Vec<u8>,
    bare: Bare,
    wake: Wake,
}

/// What the same bytes cost where the store is.
enum Bare {
    Map,
    File(File, PathBuf),
    Loopback(Echo),
    Redis(Redis),
}

/// What telling somebody costs.
enum Wake {
    Thread { ping: mpsc::Sender<()>, pong: mpsc::Receiver<()> },
    Loopback(Echo),
}

fn os(call: &'static str) -> impl Fn(std::io::Error) -> CliError {
    move |error| CliError::from(Error::from(OsError::from_io(call, &error)))
}

impl Limits {
    pub(super) fn new(url: &StoreUrl, names: &[RecordName], value: &[u8]) -> Result<Self, CliError> {
        let bare = match url {
            StoreUrl::Memory => Bare::Map,
            StoreUrl::Redb(path) => {
                let path = path.with_extension("bench-limit");
                Bare::File(File::create(&path).map_err(os("open"))?, path)
            }
            StoreUrl::Redis(url) => Bare::Redis(Redis::connect(&url.url, names, value).map_err(os("redis"))?),
            _ => Bare::Loopback(Echo::start().map_err(os("connect"))?),
        };
        let wake = match bare {
            Bare::Map | Bare::File(..) => Wake::start(),
            Bare::Loopback(_) | Bare::Redis(_) => Wake::Loopback(Echo::start().map_err(os("connect"))?),
        };
        let map = names.iter().map(|name| (name.clone(), value.into())).collect();
        Ok(Self { map, names: names.to_vec(), value: value.to_vec(), bare, wake })
    }

    pub(super) fn is_remote(&self) -> bool {
        matches!(self.wake, Wake::Loopback(_))
    }

    pub(super) fn read_is(&self) -> &'static str {
        match self.bare {
            Bare::Map | Bare::File(..) => "map looks",
            Bare::Loopback(_) => "tcp round trip",
            Bare::Redis(_) => "redis MGET",
        }
    }

    pub(super) fn write_is(&self) -> &'static str {
        match self.bare {
            Bare::Map => "map insert",
            Bare::File(..) => "write, sync",
            Bare::Loopback(_) => "tcp round trip",
            Bare::Redis(_) => "redis SET",
        }
    }

    pub(super) fn wake_is(&self) -> &'static str {
        match self.wake {
            Wake::Thread { .. } => "thread round trip",
            Wake::Loopback(_) => "tcp round trip",
        }
    }

    /// Reads as many values; nanoseconds.
    pub(super) fn read(&mut self, keys: usize) -> Result<u64, CliError> {
        let watch = Stopwatch::start();
        match &mut self.bare {
            Bare::Map | Bare::File(..) => {
                let found: Vec<_> = self.names[..keys].iter().map(|name| self.map.get(name)).collect();
                std::hint::black_box(found);
            }
            Bare::Loopback(echo) => {
                let asked = self.names[..keys].iter().map(|name| name.as_str().len()).sum();
                echo.round_trip(asked, keys * self.value.len()).map_err(os("read"))?;
            }
            Bare::Redis(redis) => redis.mget(keys).map_err(os("read"))?,
        }
        Ok(watch.elapsed_ns())
    }

    /// Writes one value; nanoseconds.
    pub(super) fn write(&mut self) -> Result<u64, CliError> {
        let watch = Stopwatch::start();
        match &mut self.bare {
            Bare::Map => drop(self.map.insert(self.names[0].clone(), self.value.as_slice().into())),
            Bare::File(file, _) => {
                let written = file.seek(SeekFrom::Start(0)).and_then(|_| file.write_all(&self.value));
                written.and_then(|()| file.sync_data()).map_err(os("fdatasync"))?;
            }
            Bare::Loopback(echo) => echo.round_trip(self.value.len(), PING_LEN).map_err(os("read"))?,
            Bare::Redis(redis) => redis.set(&self.value).map_err(os("read"))?,
        }
        Ok(watch.elapsed_ns())
    }

    /// Looks one name up, `looks` times; nanoseconds in all.
    pub(super) fn look(&self, looks: u32) -> u64 {
        let watch = Stopwatch::start();
        for _ in 0..looks {
            std::hint::black_box(self.map.get(std::hint::black_box(&self.names[0])));
        }
        watch.elapsed_ns()
    }

    /// Tells somebody and hears back; nanoseconds.
    pub(super) fn wake(&mut self) -> Result<u64, CliError> {
        let watch = Stopwatch::start();
        match &mut self.wake {
            // Its thread lives as long as `ping`.
            Wake::Thread { ping, pong } => {
                ping.send(()).unwrap_or_default();
                pong.recv().unwrap_or_default();
            }
            Wake::Loopback(echo) => echo.round_trip(PING_LEN, PING_LEN).map_err(os("read"))?,
        }
        Ok(watch.elapsed_ns())
    }
}

impl Drop for Limits {
    fn drop(&mut self) {
        if let Bare::File(_, path) = &self.bare {
            // It may be gone already.
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Wake {
    fn start() -> Self {
        let (ping, pinged) = mpsc::channel();
        let (answer, pong) = mpsc::channel();
        std::thread::spawn(move || while pinged.recv().is_ok() && answer.send(()).is_ok() {});
        Self::Thread { ping, pong }
    }
}

/// A connection to a thread that answers with as many bytes as it is told.
struct Echo {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Echo {
    fn start() -> std::io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let stream = TcpStream::connect(listener.local_addr()?)?;
        let (peer, _) = listener.accept()?;
        for end in [&stream, &peer] {
            end.set_nodelay(true)?;
        }
        // Ends with the connection.
        std::thread::spawn(move || answer(peer));
        Ok(Self { stream, buffer: Vec::new() })
    }

    fn round_trip(&mut self, asked: usize, answered: usize) -> std::io::Result<()> {
        let mut head = [0; 16];
        head[..8].copy_from_slice(&(asked as u64).to_le_bytes());
        head[8..].copy_from_slice(&(answered as u64).to_le_bytes());
        self.buffer.resize(self.buffer.len().max(asked + 16).max(answered), 0);
        self.buffer[..16].copy_from_slice(&head);
        self.stream.write_all(&self.buffer[..asked + 16])?;
        self.stream.read_exact(&mut self.buffer[..answered])
    }
}

/// The other end of an [`Echo`].
fn answer(mut peer: TcpStream) {
    let (mut head, mut buffer) = ([0; 16], Vec::new());
    while peer.read_exact(&mut head).is_ok() {
        let (asked, answered) = head.split_at(8);
        let len = |bytes: &[u8]| bytes.iter().rev().fold(0, |len: usize, &byte| len << 8 | usize::from(byte));
        let (asked, answered) = (len(asked), len(answered));
        buffer.resize(buffer.len().max(asked).max(answered), 0);
        let done = peer.read_exact(&mut buffer[..asked]).and_then(|()| peer.write_all(&buffer[..answered]));
        if done.is_err() {
            return;
        }
    }
}

/// A bare connection to Redis, and keys of its own, deleted when it ends.
struct Redis {
    stream: BufReader<TcpStream>,
    keys: Vec<String>,
}

impl Redis {
    fn connect(url: &str, names: &[RecordName], value: &[u8]) -> std::io::Result<Self> {
        let address = url.trim_start_matches("redis://").rsplit('@').next().unwrap_or_default();
        let address = address.split(['/', '?']).next().unwrap_or_default();
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        let keys = names.iter().map(|name| format!("ibex-limit:{name}")).collect();
        let mut redis = Self { stream: BufReader::new(stream), keys };
        for index in 0..redis.keys.len() {
            let key = redis.keys[index].clone();
            redis.command(&[b"SET", key.as_bytes(), value])?;
            redis.reply()?;
        }
        Ok(redis)
    }

    fn command(&mut self, words: &[&[u8]]) -> std::io::Result<()> {
        let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            bytes.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
            bytes.extend_from_slice(word);
            bytes.extend_from_slice(b"\r\n");
        }
        self.stream.get_mut().write_all(&bytes)
    }

    /// Reads one reply and forgets it; a list is as many replies.
    fn reply(&mut self) -> std::io::Result<()> {
        let mut left = 1_u64;
        while left > 0 {
            left -= 1;
            let mut line = String::new();
            self.stream.read_line(&mut line)?;
            let number = line.get(1..).and_then(|rest| rest.trim().parse::<u64>().ok());
            match (line.as_bytes().first(), number) {
                (Some(b'*'), Some(count)) => left += count,
                (Some(b'$'), Some(len)) => {
                    let body = (&mut self.stream).take(len + 2);
                    std::io::copy(&mut { body }, &mut std::io::sink())?;
                }
                (Some(b'+' | b':' | b'$'), _) => {}
                _ => return Err(std::io::Error::other(line)),
            }
        }
        Ok(())
    }

    fn mget(&mut self, keys: usize) -> std::io::Result<()> {
        let keys = self.keys[..keys].to_vec();
        let words: Vec<&[u8]> = [&b"MGET"[..]].into_iter().chain(keys.iter().map(String::as_bytes)).collect();
        self.command(&words)?;
        self.reply()
    }

    fn set(&mut self, value: &[u8]) -> std::io::Result<()> {
        let key = self.keys[0].clone();
        self.command(&[b"SET", key.as_bytes(), value])?;
        self.reply()
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let keys = self.keys.clone();
        let words: Vec<&[u8]> = [&b"DEL"[..]].into_iter().chain(keys.iter().map(String::as_bytes)).collect();
        // A Redis that is gone has nothing to delete.
        let _ = self.command(&words).and_then(|()| self.reply());
    }
}
