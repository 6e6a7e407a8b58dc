//! Bytes of a request -> [`JobInput`], strictly: limits first, then every fault of type and name at once.
//!
//! Ranges are the business of [`super::validate`]; [`valid`] does both and reports both kinds together.

use serde_json::Map;

use super::class::{ErrorClass, Fault};
use super::fields::{self, FIELDS, LORA_FIELDS, shown};
use super::json::{self, Json, Refused};
use super::validate::{self, MAX_LORAS, MAX_METADATA_DEPTH, MAX_REQUEST_BYTES};
use super::{JobInput, JobType, Lora, Prediction, SizePolicy, ValidJob};

/// Unknown fields that are named one by one; more become one line.
const MAX_UNKNOWN: usize = 8;

/// Reads a request and fills the defaults.
///
/// # Errors
/// Every fault of structure, name and type, in the order of the contract.
pub fn parse(bytes: &[u8]) -> Result<JobInput, Vec<Fault>> {
    let (input, faults) = read(bytes).map_err(|fault| vec![fault])?;
    if faults.is_empty() { Ok(input) } else { Err(faults) }
}

/// Reads and validates a request.
///
/// # Errors
/// Every fault of both, in the order of the contract.
pub fn valid(bytes: &[u8]) -> Result<ValidJob, Vec<Fault>> {
    let (input, mut faults) = read(bytes).map_err(|fault| vec![fault])?;
    match validate::validate(input) {
        Ok(job) if faults.is_empty() => return Ok(job),
        Ok(_) => {}
        Err(more) => {
            // A field that could not be read holds a stand-in, whose range says nothing.
            let unread: Vec<String> =
                faults.iter().map(|fault| fields::root(&fault.field).to_owned()).collect();
            faults.extend(
                more.into_iter()
                    .filter(|fault| !unread.iter().any(|name| name == fields::root(&fault.field))),
            );
        }
    }
    faults.sort_by_key(|fault| fields::rank(&fault.field));
    Err(faults)
}

/// The request with stand-ins for what could not be read; `Err` when nothing could.
fn read(bytes: &[u8]) -> Result<(JobInput, Vec<Fault>), Fault> {
    if bytes.len() > MAX_REQUEST_BYTES {
        let message =
            format!("the request has {} bytes, wanted at most {MAX_REQUEST_BYTES}", bytes.len());
        return Err(Fault::new(ErrorClass::TooLarge, "", message));
    }
    let document = json::read(bytes, 1 + MAX_METADATA_DEPTH).map_err(|refused| match refused {
        Refused::Syntax(what) => Fault::new(
            ErrorClass::InvalidJson,
            "",
            format!("the request is not valid JSON: {what}"),
        ),
        Refused::Depth(max) => {
            let message = format!("the request is nested more than {max} deep");
            Fault::new(ErrorClass::TooDeep, "", message)
        }
    })?;
    let Json::Object(members) = document else {
        let message = format!("the request is {}, wanted one JSON object", document.kind());
        return Err(Fault::new(ErrorClass::WrongType, "", message));
    };
    let mut form = Form { prefix: String::new(), members, faults: Vec::new() };
    let input = form.job();
    form.refuse_rest(FIELDS);
    form.faults.sort_by_key(|fault| fields::rank(&fault.field));
    Ok((input, form.faults))
}

/// An object whose members are taken out one by one; what is wrong with them gathers.
struct Form {
    prefix: String,
    members: Vec<(String, Json)>,
    faults: Vec<Fault>,
}

impl Form {
    fn job(&mut self) -> JobInput {
        let prompt = self.required("prompt").and_then(|json| self.text("prompt", json));
        let user_id = self.required("user_id").and_then(|json| self.text("user_id", json));
        let job_type = self.required("job_type").and_then(|json| self.job_type(json));
        let mut job = JobInput::new(
            prompt.unwrap_or_default(),
            job_type.unwrap_or(JobType::Image),
            user_id.unwrap_or_default(),
        );
        // The public fields mean what they say: `null` is not a style, a width or a duration.
        self.put("style", Self::text, &mut job.style);
        self.put("width", Self::whole, &mut job.width);
        self.put("height", Self::whole, &mut job.height);
        self.put("duration", Self::float, &mut job.duration);
        self.put("metadata", Self::metadata, &mut job.metadata);
        // In the optional extensions `null` is how many clients write "not given".
        job.negative_prompt = self.optional("negative_prompt", Self::text);
        job.seed = self.optional("seed", Self::seed);
        job.steps = self.optional("steps", Self::whole);
        job.guidance = self.optional("guidance", Self::float);
        job.sampler = self.optional("sampler", Self::text);
        job.image_model = self.optional("image_model", Self::text);
        job.video_model = self.optional("video_model", Self::text);
        job.fps = self.optional("fps", Self::float);
        job.motion = self.optional("motion", Self::whole);
        job.noise_aug = self.optional("noise_aug", Self::float);
        job.image = self.optional("image", Self::text);
        job.strength = self.optional("strength", Self::float);
        job.batch = self.optional("batch", Self::whole);
        job.clip_skip = self.optional("clip_skip", Self::whole);
        job.vae = self.optional("vae", Self::text);
        job.prediction = self.optional("prediction", Self::prediction);
        job.loras = self.optional("loras", Self::loras).unwrap_or_default();
        job.size_policy = self.optional("size_policy", Self::size_policy).unwrap_or_default();
        job.embed_metadata = self.optional("embed_metadata", Self::flag).unwrap_or(true);
        job.approve = self.optional("approve", Self::flag).unwrap_or(false);
        job.priority = self.optional("priority", Self::whole);
        job
    }

    fn take(&mut self, field: &str) -> Option<Json> {
        let at = self.members.iter().position(|(name, _)| name == field)?;
        Some(self.members.remove(at).1)
    }

    fn required(&mut self, field: &str) -> Option<Json> {
        let found = self.take(field);
        if found.is_none() {
            let wanted = fields::wanted(&self.path(field));
            self.fault(ErrorClass::MissingField, field, format!("missing, wanted {wanted}"));
        }
        found
    }

    fn put<T>(&mut self, field: &str, read: fn(&mut Self, &str, Json) -> Option<T>, place: &mut T) {
        if let Some(value) = self.take(field).and_then(|json| read(self, field, json)) {
            *place = value;
        }
    }

    fn optional<T>(
        &mut self,
        field: &str,
        read: fn(&mut Self, &str, Json) -> Option<T>,
    ) -> Option<T> {
        let json = self.take(field).filter(|json| *json != Json::Null)?;
        read(self, field, json)
    }

    fn path(&self, field: &str) -> String {
        format!("{}{field}", self.prefix)
    }

    fn fault(&mut self, class: ErrorClass, field: &str, message: String) {
        self.faults.push(Fault::new(class, self.path(field), message));
    }

    /// A fault of the form "got …, wanted …".
    fn got(&mut self, class: ErrorClass, field: &str, got: &str) {
        let wanted = fields::wanted(&self.path(field));
        self.fault(class, field, format!("got {got}, wanted {wanted}"));
    }

    fn wrong<T>(&mut self, field: &str, json: &Json) -> Option<T> {
        let got = match json {
            Json::Text(text) => format!("the text {}", shown(text)),
            Json::Number(token) => format!("the number {}", shown(token)),
            Json::Bool(flag) => format!("`{flag}`"),
            Json::Null => "`null`".to_owned(),
            other => other.kind().to_owned(),
        };
        self.got(ErrorClass::WrongType, field, &got);
        None
    }

    fn text(&mut self, field: &str, json: Json) -> Option<String> {
        match json {
            Json::Text(text) => Some(text),
            other => self.wrong(field, &other),
        }
    }

    fn float(&mut self, field: &str, json: Json) -> Option<f64> {
        let Json::Number(token) = json else { return self.wrong(field, &json) };
        let value = token.parse().ok().filter(|value: &f64| value.is_finite());
        if value.is_none() {
            self.got(ErrorClass::OutOfRange, field, &shown(&token));
        }
        value
    }

    fn seed(&mut self, field: &str, json: Json) -> Option<u64> {
        let Json::Number(token) = json else { return self.wrong(field, &json) };
        if !json::is_whole(&token) {
            let got = format!("{} with a point or exponent", shown(&token));
            self.got(ErrorClass::WrongType, field, &got);
            return None;
        }
        let value = token.parse().ok();
        if value.is_none() {
            self.got(ErrorClass::OutOfRange, field, &shown(&token));
        }
        value
    }

    fn whole(&mut self, field: &str, json: Json) -> Option<u32> {
        let value = self.seed(field, json)?;
        let small = u32::try_from(value).ok();
        if small.is_none() {
            self.got(ErrorClass::OutOfRange, field, &format!("`{value}`"));
        }
        small
    }

    fn job_type(&mut self, json: Json) -> Option<JobType> {
        let text = self.text("job_type", json)?;
        match text.to_ascii_uppercase().as_str() {
            "IMAGE" => Some(JobType::Image),
            "VIDEO" => Some(JobType::Video),
            _ => {
                self.got(ErrorClass::UnknownJobType, "job_type", &shown(&text));
                None
            }
        }
    }

    fn size_policy(&mut self, field: &str, json: Json) -> Option<SizePolicy> {
        self.word(field, json, &[("fit", SizePolicy::Fit), ("exact", SizePolicy::Exact)])
    }

    fn prediction(&mut self, field: &str, json: Json) -> Option<Prediction> {
        let words = [("epsilon", Prediction::Epsilon), ("v_prediction", Prediction::VPrediction)];
        self.word(field, json, &words)
    }

    /// One of a few words.
    fn word<T: Copy>(&mut self, field: &str, json: Json, words: &[(&str, T)]) -> Option<T> {
        let text = self.text(field, json)?;
        let known = words.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
        if known.is_none() {
            self.got(ErrorClass::OutOfRange, field, &shown(&text));
        }
        known
    }

    fn flag(&mut self, field: &str, json: Json) -> Option<bool> {
        match json {
            Json::Bool(flag) => Some(flag),
            other => self.wrong(field, &other),
        }
    }

    fn metadata(&mut self, field: &str, json: Json) -> Option<Map<String, serde_json::Value>> {
        let Json::Object(members) = json else { return self.wrong(field, &json) };
        match json::into_map(members) {
            Ok(map) => Some(map),
            Err((path, token)) => {
                let message = format!(
                    "holds the number {} at {}, wanted whole numbers of at most 64 bits; \
                     send longer ones as text",
                    shown(&token),
                    shown(&format!("metadata{path}")),
                );
                self.fault(ErrorClass::OutOfRange, field, message);
                None
            }
        }
    }

    fn loras(&mut self, field: &str, json: Json) -> Option<Vec<Lora>> {
        let Json::List(items) = json else { return self.wrong(field, &json) };
        if items.len() > MAX_LORAS {
            let got = format!("{} entries", items.len());
            self.got(ErrorClass::OutOfRange, field, &got);
            return None;
        }
        let mut loras = Vec::with_capacity(items.len());
        for (index, item) in items.into_iter().enumerate() {
            let Json::Object(members) = item else {
                let message =
                    format!("got {}, wanted an object with `name` and `scale`", item.kind());
                self.fault(ErrorClass::WrongType, &format!("loras[{index}]"), message);
                continue;
            };
            let prefix = format!("loras[{index}].");
            let mut form = Form { prefix, members, faults: Vec::new() };
            let name = form.required("name").and_then(|json| form.text("name", json));
            let scale = form.optional("scale", Self::float).unwrap_or(1.0);
            form.refuse_rest(LORA_FIELDS);
            self.faults.append(&mut form.faults);
            loras.extend(name.map(|name| Lora { name, scale }));
        }
        Some(loras)
    }

    /// What is still there is unknown.
    fn refuse_rest(&mut self, known: &[(&str, &str)]) {
        let rest: Vec<String> = self.members.drain(..).map(|(name, _)| name).collect();
        for name in rest.iter().take(MAX_UNKNOWN) {
            let label = shown(name);
            let message = format!("unknown field, {}", fields::advice(name, known));
            self.fault(ErrorClass::UnknownField, label.trim_matches('`'), message);
        }
        if rest.len() > MAX_UNKNOWN {
            let message = format!("and {} more unknown fields", rest.len() - MAX_UNKNOWN);
            self.fault(ErrorClass::UnknownField, "", message);
        }
    }
}
