//! Ledgers as bytes: little-endian, versioned, checksummed.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `surgledg` for rows and columns, `surgelem` for elements |
//! | 4 | version of the format, 1 |
//! | 8 | number of layers L |
//! | 16 L | rows and columns of each layer; for elements, parameters and how many of them are gone |
//! | 8 | number of shots T |
//! | 8 T | parameters removed after each shot |
//! | ⌈(R + C) / 8⌉ a layer | keep bits, rows before columns, lowest bit first, padded with zeros; nothing for elements |
//! | 8 | FNV-1a of all bytes before |
//!
//! Memory is taken only for what the bytes can really hold, so damaged lengths are harmless.

use crate::error::{CoreError, Result};

const VERSION: u32 = 1;
const CUT: CoreError = CoreError::Corrupt("it ends too early");

/// What a ledger books.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Booked {
    RowsColumns,
    Elements,
}

impl Booked {
    const ALL: [Self; 2] = [Self::RowsColumns, Self::Elements];

    /// What the bytes start with. A single damaged byte must not turn one into the other.
    fn magic(self) -> &'static [u8; 8] {
        match self {
            Self::RowsColumns => b"surgledg",
            Self::Elements => b"surgelem",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::RowsColumns => "rows and columns",
            Self::Elements => "single elements",
        }
    }
}

/// Two numbers a layer.
pub(super) type Pairs = Vec<[u64; 2]>;

/// A ledger's bytes. The `masks` are those of each layer, if it keeps any.
pub(super) fn write<'a>(
    booked: Booked,
    layers: &[[u64; 2]],
    history: &[u64],
    masks: impl Iterator<Item = (&'a [bool], &'a [bool])>,
) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(booked.magic());
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    let mut word = |value: u64| bytes.extend_from_slice(&value.to_le_bytes());
    word(layers.len() as u64);
    layers.iter().flatten().copied().for_each(&mut word);
    word(history.len() as u64);
    history.iter().copied().for_each(&mut word);
    for (rows, columns) in masks {
        let bits: Vec<bool> = rows.iter().chain(columns).copied().collect();
        let pack = |byte: &[bool]| byte.iter().rev().fold(0, |b, &bit| b << 1 | u8::from(bit));
        bytes.extend(bits.chunks(8).map(pack));
    }
    bytes.extend_from_slice(&checksum(&bytes).to_le_bytes());
    bytes
}

/// Reads what [`write()`] wrote, up to the masks, which the reader then still holds.
///
/// # Errors
/// [`CoreError::OtherLedger`] for a ledger that books something else; [`CoreError::Corrupt`] if
/// anything is missing or damaged, or if the format is of a newer version.
pub(super) fn read(booked: Booked, bytes: &[u8]) -> Result<(Pairs, Vec<u64>, Reader<'_>)> {
    let mut reader = Reader { bytes };
    let magic = reader.take(8)?;
    match Booked::ALL.into_iter().find(|kind| kind.magic() == magic) {
        Some(found) if found == booked => {}
        Some(found) => {
            return Err(CoreError::OtherLedger { expected: booked.name(), found: found.name() });
        }
        None => return Err(CoreError::Corrupt("it does not start like one")),
    }
    if reader.take(4)? != VERSION.to_le_bytes() {
        return Err(CoreError::Corrupt("it was written in another version of the format"));
    }
    let (body, sum) = reader.bytes.split_last_chunk().ok_or(CUT)?;
    if u64::from_le_bytes(*sum) != checksum(&bytes[..bytes.len() - 8]) {
        return Err(CoreError::Corrupt("its checksum does not match"));
    }
    reader.bytes = body;

    let count = reader.length(16)?;
    let mut layers = Vec::with_capacity(count);
    for _ in 0..count {
        layers.push([reader.word()?, reader.word()?]);
    }
    let shots = reader.length(8)?;
    let mut history = Vec::with_capacity(shots);
    for _ in 0..shots {
        history.push(reader.word()?);
    }
    Ok((layers, history, reader))
}

/// What is left to read.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, length: u64) -> Result<&'a [u8]> {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let (head, tail) = self.bytes.split_at_checked(length).ok_or(CUT)?;
        self.bytes = tail;
        Ok(head)
    }

    fn word(&mut self) -> Result<u64> {
        let mut word = [0; 8];
        word.copy_from_slice(self.take(8)?);
        Ok(u64::from_le_bytes(word))
    }

    /// The length of a list of entries of `size` bytes, which must not exceed what is there.
    fn length(&mut self, size: u64) -> Result<usize> {
        let length = self.word()?;
        if length > self.bytes.len() as u64 / size {
            return Err(CUT);
        }
        Ok(length as usize)
    }

    /// Keep masks of so many rows and columns of one layer.
    pub(super) fn masks(&mut self, rows: u64, columns: u64) -> Result<(Vec<bool>, Vec<bool>)> {
        let length = rows.checked_add(columns).ok_or(CUT)?;
        let bytes = self.take(length.div_ceil(8))?;
        let bit = |place: u64| bytes[(place / 8) as usize] >> (place % 8) & 1 == 1;
        if (length..bytes.len() as u64 * 8).any(bit) {
            return Err(CoreError::Corrupt("its padding is not empty"));
        }
        Ok(((0..rows).map(bit).collect(), (rows..length).map(bit).collect()))
    }

    /// Check that nothing is left.
    pub(super) fn end(&self) -> Result<()> {
        if self.bytes.is_empty() {
            Ok(())
        } else {
            Err(CoreError::Corrupt("something follows its end"))
        }
    }
}

/// FNV-1a of 64 bits. Each step is a bijection of the state, so a single damaged byte always shows.
pub(super) fn checksum(bytes: &[u8]) -> u64 {
    let step = |state: u64, &byte: &u8| (state ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}
