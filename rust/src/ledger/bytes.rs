//! The ledger as bytes: little-endian, versioned, checksummed.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `surgledg` |
//! | 4 | version of the format, 1 |
//! | 8 | number of layers L |
//! | 16 L | rows and columns of each layer |
//! | 8 | number of shots T |
//! | 8 T | parameters removed after each shot |
//! | ⌈(R + C) / 8⌉ a layer | keep bits, rows before columns, lowest bit first, padded with zeros |
//! | 8 | FNV-1a of all bytes before |

use super::Ledger;
use crate::error::{CoreError, Result};
use crate::units::Shape;

const MAGIC: &[u8; 8] = b"surgledg";
const VERSION: u32 = 1;

impl Ledger {
    /// The ledger as bytes that [`Ledger::from_bytes`] reads back on any machine.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        let mut word = |value: u64| bytes.extend_from_slice(&value.to_le_bytes());
        word(self.shapes.len() as u64);
        for shape in &self.shapes {
            word(shape.rows);
            word(shape.columns);
        }
        word(self.history.len() as u64);
        self.history.iter().copied().for_each(word);
        for (rows, columns) in self.keep_rows.iter().zip(&self.keep_columns) {
            let bits: Vec<bool> = rows.iter().chain(columns).copied().collect();
            let pack = |byte: &[bool]| byte.iter().rev().fold(0, |b, &bit| b << 1 | u8::from(bit));
            bytes.extend(bits.chunks(8).map(pack));
        }
        bytes.extend_from_slice(&checksum(&bytes).to_le_bytes());
        bytes
    }

    /// Reads what [`Ledger::to_bytes`] wrote.
    ///
    /// Memory is taken only for what the bytes can really hold, so damaged lengths are harmless.
    ///
    /// # Errors
    /// [`CoreError::Corrupt`] if anything is missing, left over, damaged or contradictory, or if
    /// the format is of a newer version.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader { bytes };
        if reader.take(MAGIC.len() as u64)? != MAGIC {
            return Err(CoreError::Corrupt("it does not start like one"));
        }
        let mut version = [0; 4];
        version.copy_from_slice(reader.take(4)?);
        if u32::from_le_bytes(version) != VERSION {
            return Err(CoreError::Corrupt("it was written in another version of the format"));
        }
        let sum_at = bytes.len().checked_sub(8).ok_or(CoreError::Corrupt("it ends too early"))?;
        if (Reader { bytes: &bytes[sum_at..] }).word()? != checksum(&bytes[..sum_at]) {
            return Err(CoreError::Corrupt("its checksum does not match"));
        }

        let layers = reader.length(16)?;
        let mut shapes = Vec::with_capacity(layers);
        for _ in 0..layers {
            shapes.push(Shape { rows: reader.word()?, columns: reader.word()? });
        }
        let shots = reader.length(8)?;
        let mut history = Vec::with_capacity(shots);
        for _ in 0..shots {
            history.push(reader.word()?);
        }
        let mut masks = Vec::with_capacity(shapes.len());
        for shape in &shapes {
            masks.push(reader.bits(*shape)?);
        }
        reader.word()?;
        if !reader.bytes.is_empty() {
            return Err(CoreError::Corrupt("something follows its end"));
        }

        let total = crate::units::total_parameters(&shapes)
            .map_err(|_| CoreError::Corrupt("its shapes are too large"))?;
        let (keep_rows, keep_columns) = masks.into_iter().unzip();
        let ledger = Self { shapes, keep_rows, keep_columns, history, total };
        if !ledger.history.is_sorted() || ledger.count() != ledger.removed() {
            return Err(CoreError::Corrupt("its history contradicts its masks"));
        }
        Ok(ledger)
    }
}

/// What is left to read.
struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, length: u64) -> Result<&'a [u8]> {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let (head, tail) =
            self.bytes.split_at_checked(length).ok_or(CoreError::Corrupt("it ends too early"))?;
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
            return Err(CoreError::Corrupt("it ends too early"));
        }
        Ok(length as usize)
    }

    /// Keep masks of the rows and the columns of one layer.
    fn bits(&mut self, shape: Shape) -> Result<(Vec<bool>, Vec<bool>)> {
        let length = shape.rows.checked_add(shape.columns);
        let length = length.ok_or(CoreError::Corrupt("it ends too early"))?;
        let bytes = self.take(length.div_ceil(8))?;
        let bit = |place: u64| bytes[(place / 8) as usize] >> (place % 8) & 1 == 1;
        if (length..bytes.len() as u64 * 8).any(bit) {
            return Err(CoreError::Corrupt("its padding is not empty"));
        }
        Ok(((0..shape.rows).map(bit).collect(), (shape.rows..length).map(bit).collect()))
    }
}

/// FNV-1a of 64 bits. Each step is a bijection of the state, so a single damaged byte always shows.
fn checksum(bytes: &[u8]) -> u64 {
    let step = |state: u64, &byte: &u8| (state ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}
