//! The grammar of filters.

use super::{Field, Filter, Selector, Test, pattern};

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("parse filter {filter:?} at byte {at}: {what}")]
pub struct Error {
    filter: String,
    at: usize,
    what: &'static str,
}

pub(super) fn filter(text: &str) -> Result<Filter, Error> {
    if text.is_empty() {
        return Ok(Filter(Vec::new()));
    }
    let mut parser = Parser { text, at: 0 };
    let mut selectors = vec![parser.selector()?];
    while parser.peek().is_some() {
        if !parser.take(",") {
            return Err(parser.error("expected ',' or the end"));
        }
        selectors.push(parser.selector()?);
    }
    Ok(Filter(selectors))
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl Parser<'_> {
    fn selector(&mut self) -> Result<Selector, Error> {
        let mut path = vec![self.field()?];
        while self.take(".") {
            path.push(self.field()?);
        }
        let field = Field::new(&path);
        if matches!(self.peek(), None | Some(',')) {
            return Ok(Selector { field, test: Test::Present });
        }
        self.skip_spaces();
        let start = self.at;
        let operator = self.run(|c| matches!(c, '=' | '!' | '~')).to_owned();
        let test = match operator.as_str() {
            "==" => Test::Equal(self.value(false)?),
            "!=" => Test::NotEqual(self.value(false)?),
            "~=" => Test::Matches(pattern(&self.value(true)?)),
            _ => {
                self.at = start;
                return Err(self.error("expected '==', '!=' or '~='"));
            }
        };
        Ok(Selector { field, test })
    }

    fn field(&mut self) -> Result<Vec<u8>, Error> {
        self.skip_spaces();
        if self.peek() == Some('"') {
            return self.quoted();
        }
        let field = self.run(|c| c.is_ascii_alphanumeric() || c == '_').as_bytes().to_vec();
        if field.is_empty() {
            return Err(self.error("expected a field or a quoted string"));
        }
        Ok(field)
    }

    fn value(&mut self, patterns: bool) -> Result<Vec<u8>, Error> {
        self.skip_spaces();
        match self.peek() {
            Some('"') => self.quoted(),
            Some('/' | '|') if patterns => self.quoted(),
            Some('/' | '|') => Err(self.error("such a value has to be in double quotes")),
            None | Some(',' | '.') => Err(self.error("expected a value")),
            Some(_) => {
                let value = self.run(|c| c != ',' && !c.is_whitespace() && !c.is_control());
                let value = value.as_bytes().to_vec();
                if value.is_empty() { Err(self.error("expected a value")) } else { Ok(value) }
            }
        }
    }

    /// A Go string literal, in whatever quotes the next character is.
    fn quoted(&mut self) -> Result<Vec<u8>, Error> {
        let start = self.at;
        let quote = self.next().unwrap_or('"');
        let mut value = Vec::new();
        loop {
            match self.next() {
                None | Some('\n') => {
                    self.at = start;
                    return Err(self.error("quoted string not terminated"));
                }
                Some(c) if c == quote => return Ok(value),
                Some('\\') => self.escape(quote, &mut value)?,
                Some(c) => push(&mut value, c),
            }
        }
    }

    fn escape(&mut self, quote: char, value: &mut Vec<u8>) -> Result<(), Error> {
        let illegal = "illegal escape sequence";
        let byte = match self.next().ok_or_else(|| self.error(illegal))? {
            'a' => 0x07,
            'b' => 0x08,
            'f' => 0x0c,
            'n' => b'\n',
            'r' => b'\r',
            't' => b'\t',
            'v' => 0x0b,
            '\\' => b'\\',
            c if c == quote => {
                push(value, c);
                return Ok(());
            }
            'x' => self.digits(2, 16, 0)?.try_into().map_err(|_| self.error(illegal))?,
            c @ '0'..='7' => {
                let first = c.to_digit(8).unwrap_or_default();
                self.digits(2, 8, first)?.try_into().map_err(|_| self.error(illegal))?
            }
            c @ ('u' | 'U') => {
                let number = self.digits(if c == 'u' { 4 } else { 8 }, 16, 0)?;
                let c = char::from_u32(number).ok_or_else(|| self.error(illegal))?;
                push(value, c);
                return Ok(());
            }
            _ => return Err(self.error(illegal)),
        };
        value.push(byte);
        Ok(())
    }

    fn digits(&mut self, count: usize, radix: u32, first: u32) -> Result<u32, Error> {
        let mut number = first;
        for _ in 0..count {
            let digit = self.next().and_then(|c| c.to_digit(radix));
            let digit = digit.ok_or_else(|| self.error("illegal escape sequence"))?;
            number =
                number.checked_mul(radix).and_then(|n| n.checked_add(digit)).unwrap_or(u32::MAX);
        }
        Ok(number)
    }

    fn peek(&self) -> Option<char> {
        self.text.get(self.at..).and_then(|rest| rest.chars().next())
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        Some(c)
    }

    fn take(&mut self, token: &str) -> bool {
        let there = self.text.get(self.at..).is_some_and(|rest| rest.starts_with(token));
        if there {
            self.at += token.len();
        }
        there
    }

    fn run(&mut self, wanted: impl Fn(char) -> bool) -> &str {
        let start = self.at;
        while self.peek().is_some_and(&wanted) {
            self.next();
        }
        self.text.get(start..self.at).unwrap_or_default()
    }

    fn skip_spaces(&mut self) {
        self.run(char::is_whitespace);
    }

    fn error(&self, what: &'static str) -> Error {
        Error { filter: self.text.chars().take(200).collect(), at: self.at, what }
    }
}

fn push(value: &mut Vec<u8>, c: char) {
    value.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
}
