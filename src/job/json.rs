//! A strict JSON reader for requests: small, bounded, and it says where it stopped.
//!
//! `serde_json` would keep the last of two equal keys, turn a number of forty digits into a float and recurse
//! before anybody counts. This reader refuses duplicate keys, lone surrogates, numbers without a finite value and
//! nesting over a given depth, and keeps each number as it was written, so that [`super::parse`] can tell
//! `512` from `512.0`.

use serde_json::{Map, Number, Value};

/// One JSON value as it was written.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Json {
    Null,
    Bool(bool),
    /// The token itself: a number's type depends on the field it is for.
    Number(String),
    Text(String),
    List(Vec<Json>),
    /// In the order of the document, keys unique.
    Object(Vec<(String, Json)>),
}

/// Why a text is not the JSON we accept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// Not JSON; one line with the place.
    Syntax(String),
    /// Nested deeper than allowed.
    Depth(usize),
}

/// Reads exactly one value, nested at most `max_depth` containers deep.
pub(super) fn read(bytes: &[u8], max_depth: usize) -> Result<Json, Refused> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        Refused::Syntax(format!("the byte at offset {} is not UTF-8", error.valid_up_to()))
    })?;
    if text.starts_with('\u{feff}') {
        return Err(Refused::Syntax("it starts with a byte order mark".to_owned()));
    }
    let mut reader = Reader { text, at: 0, depth: 0, max_depth };
    reader.skip_space();
    let value = reader.value()?;
    reader.skip_space();
    match reader.peek() {
        None => Ok(value),
        Some(_) => Err(reader.fault("there is more after the end of the value")),
    }
}

impl Json {
    /// What kind of value it is, for messages.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool(_) => "a boolean",
            Self::Number(_) => "a number",
            Self::Text(_) => "text",
            Self::List(_) => "a list",
            Self::Object(_) => "an object",
        }
    }

    /// The value for carrying on; `Err` holds the path and the token of a number that would lose digits.
    pub(super) fn into_value(self) -> Result<Value, (String, String)> {
        Ok(match self {
            Self::Null => Value::Null,
            Self::Bool(flag) => Value::Bool(flag),
            Self::Text(text) => Value::String(text),
            Self::Number(token) => match exact_number(&token) {
                Some(number) => Value::Number(number),
                None => return Err((String::new(), token)),
            },
            Self::List(items) => {
                let mut list = Vec::with_capacity(items.len());
                for (index, item) in items.into_iter().enumerate() {
                    let within = |(path, token)| (format!("[{index}]{path}"), token);
                    list.push(item.into_value().map_err(within)?);
                }
                Value::Array(list)
            }
            Self::Object(members) => Value::Object(into_map(members)?),
        })
    }
}

/// The members as a map; `Err` as in [`Json::into_value`].
pub(super) fn into_map(
    members: Vec<(String, Json)>,
) -> Result<Map<String, Value>, (String, String)> {
    let mut map = Map::new();
    for (key, item) in members {
        let value = item.into_value().map_err(|(path, token)| (format!(".{key}{path}"), token))?;
        map.insert(key, value);
    }
    Ok(map)
}

/// Whether a number token is written as a whole number.
pub(super) fn is_whole(token: &str) -> bool {
    !token.contains(['.', 'e', 'E'])
}

/// Integers of 64 bits and finite floats; nothing that would change its digits.
fn exact_number(token: &str) -> Option<Number> {
    if is_whole(token) {
        let unsigned = token.parse::<u64>().ok().map(Number::from);
        return unsigned.or_else(|| token.parse::<i64>().ok().map(Number::from));
    }
    token.parse::<f64>().ok().and_then(Number::from_f64)
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
    depth: usize,
    max_depth: usize,
}

impl Reader<'_> {
    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn skip_space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    /// A syntax fault at the present place, counted from line 1, column 1.
    fn fault(&self, what: &str) -> Refused {
        let mut at = self.at.min(self.text.len());
        while !self.text.is_char_boundary(at) {
            at -= 1;
        }
        let before = &self.text[..at];
        let line = before.matches('\n').count() + 1;
        let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
        Refused::Syntax(format!("{what} at line {line} column {column}"))
    }

    fn value(&mut self) -> Result<Json, Refused> {
        match self.peek() {
            None => Err(self.fault("the text ends where a value should be")),
            Some(b'{') => self.object(),
            Some(b'[') => self.list(),
            Some(b'"') => self.string().map(Json::Text),
            Some(b'-' | b'0'..=b'9') => self.number().map(Json::Number),
            Some(_) => self.word(),
        }
    }

    /// `true`, `false`, `null`; `NaN` and `Infinity` are words too, but not JSON.
    fn word(&mut self) -> Result<Json, Refused> {
        for (word, value) in
            [("true", Json::Bool(true)), ("false", Json::Bool(false)), ("null", Json::Null)]
        {
            let rest = &self.text.as_bytes()[self.at..];
            let ends = !rest.get(word.len()).is_some_and(u8::is_ascii_alphanumeric);
            if rest.starts_with(word.as_bytes()) && ends {
                self.at += word.len();
                return Ok(value);
            }
        }
        Err(self.fault("this is not a JSON value"))
    }

    /// Enters a container, which is where nesting is counted: before any recursion into it.
    fn enter(&mut self) -> Result<(), Refused> {
        self.at += 1;
        self.depth += 1;
        if self.depth > self.max_depth {
            return Err(Refused::Depth(self.max_depth));
        }
        self.skip_space();
        Ok(())
    }

    /// After an item: `true` when another follows, `false` when `close` ended the container.
    fn another(&mut self, close: u8) -> Result<bool, Refused> {
        self.skip_space();
        match self.peek() {
            Some(b',') => {
                self.at += 1;
                self.skip_space();
                Ok(true)
            }
            Some(byte) if byte == close => {
                self.at += 1;
                self.depth -= 1;
                Ok(false)
            }
            None => Err(self.fault("the text ends inside a list or object")),
            Some(_) => Err(self.fault(&format!("there should be `,` or `{}`", char::from(close)))),
        }
    }

    fn list(&mut self) -> Result<Json, Refused> {
        self.enter()?;
        let mut items = Vec::new();
        if self.peek() == Some(b']') {
            self.another(b']')?;
            return Ok(Json::List(items));
        }
        loop {
            items.push(self.value()?);
            if !self.another(b']')? {
                return Ok(Json::List(items));
            }
        }
    }

    fn object(&mut self) -> Result<Json, Refused> {
        self.enter()?;
        let mut members = Vec::new();
        let mut seen = std::collections::HashSet::new();
        if self.peek() == Some(b'}') {
            self.another(b'}')?;
            return Ok(Json::Object(members));
        }
        loop {
            if self.peek() != Some(b'"') {
                return Err(self.fault("there should be a key in double quotes"));
            }
            let key = self.string()?;
            if !seen.insert(key.clone()) {
                let shown = super::fields::shown(&key);
                return Err(self.fault(&format!("the key {shown} is given twice, again")));
            }
            self.skip_space();
            if self.peek() != Some(b':') {
                return Err(self.fault("there should be `:` after the key"));
            }
            self.at += 1;
            self.skip_space();
            let value = self.value()?;
            members.push((key, value));
            if !self.another(b'}')? {
                return Ok(Json::Object(members));
            }
        }
    }

    /// A number token of the JSON grammar whose value is finite.
    fn number(&mut self) -> Result<String, Refused> {
        let start = self.at;
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        let leading_zero = self.peek() == Some(b'0');
        let whole = self.digits();
        if whole == 0 || (leading_zero && whole > 1) {
            return Err(self.fault("this is not a JSON number"));
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            if self.digits() == 0 {
                return Err(self.fault("there should be digits after the point"));
            }
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.at += 1;
            if matches!(self.peek(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            if self.digits() == 0 {
                return Err(self.fault("there should be digits in the exponent"));
            }
        }
        let token = &self.text[start..self.at];
        let finite = is_whole(token) || token.parse::<f64>().is_ok_and(f64::is_finite);
        if !finite {
            return Err(self.fault("this number is too large to be finite, it ends"));
        }
        Ok(token.to_owned())
    }

    fn digits(&mut self) -> usize {
        let start = self.at;
        while self.peek().is_some_and(|byte| byte.is_ascii_digit()) {
            self.at += 1;
        }
        self.at - start
    }

    /// A string, from its opening quote to after its closing one.
    fn string(&mut self) -> Result<String, Refused> {
        self.at += 1;
        let mut out = String::new();
        loop {
            let start = self.at;
            while self.peek().is_some_and(|byte| byte != b'"' && byte != b'\\' && byte >= 0x20) {
                self.at += 1;
            }
            out.push_str(&self.text[start..self.at]);
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(out);
                }
                Some(b'\\') => out.push(self.escape()?),
                Some(_) => return Err(self.fault("there is a bare control character in a string")),
                None => return Err(self.fault("the text ends inside a string")),
            }
        }
    }

    /// One escape, surrogate pairs joined.
    fn escape(&mut self) -> Result<char, Refused> {
        let bytes = self.text.as_bytes();
        let letter = bytes.get(self.at + 1).copied();
        let simple = match letter {
            Some(c @ (b'"' | b'\\' | b'/')) => char::from(c),
            Some(b'b') => '\u{8}',
            Some(b'f') => '\u{c}',
            Some(b'n') => '\n',
            Some(b'r') => '\r',
            Some(b't') => '\t',
            Some(b'u') => return self.unicode_escape(),
            _ => return Err(self.fault("there is an unknown escape")),
        };
        self.at += 2;
        Ok(simple)
    }

    fn unicode_escape(&mut self) -> Result<char, Refused> {
        let first = self.unit()?;
        let code = match first {
            0xd800..=0xdbff => {
                let second = self.unit().unwrap_or(0);
                if !(0xdc00..=0xdfff).contains(&second) {
                    return Err(self.fault("there is half a surrogate pair in a string"));
                }
                0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00)
            }
            _ => first,
        };
        char::from_u32(code).ok_or_else(|| self.fault("there is half a surrogate pair in a string"))
    }

    /// One `\uXXXX`.
    fn unit(&mut self) -> Result<u32, Refused> {
        let code = self
            .text
            .get(self.at..self.at + 6)
            .and_then(|text| text.strip_prefix("\\u"))
            .filter(|hex| hex.bytes().all(|byte| byte.is_ascii_hexdigit()))
            .and_then(|hex| u32::from_str_radix(hex, 16).ok())
            .ok_or_else(|| self.fault("there should be four hex digits after `\\u`"))?;
        self.at += 6;
        Ok(code)
    }
}
