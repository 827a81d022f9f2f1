//! What a structural schema does to an object: fields that it does not list are dropped, values of another
//! type are refused.

use serde_json::Value;

/// Drops what the schema does not list, without a word. Kind and metadata are the server's own.
pub(crate) fn prune(schema: &Value, object: &mut Value) {
    let Some(fields) = object.as_object_mut() else { return };
    for (name, value) in fields.iter_mut() {
        if name == "spec" {
            prune_value(&schema["properties"]["spec"], value);
        }
    }
    fields.retain(|name, _| {
        ["apiVersion", "kind", "metadata"].contains(&name.as_str())
            || schema["properties"].get(name).is_some()
    });
}

/// As [`prune`], for a value inside an object.
pub(crate) fn prune_value(schema: &Value, value: &mut Value) {
    match value {
        Value::Object(fields) => {
            let listed = &schema["properties"];
            fields.retain(|name, value| {
                let known = listed.get(name);
                let is_nullable = known.is_some_and(|known| known["nullable"] == true);
                known.is_some() && (!value.is_null() || is_nullable)
            });
            for (name, value) in fields.iter_mut() {
                prune_value(&listed[name], value);
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| prune_value(&schema["items"], item)),
        _ => {}
    }
}

/// Whether every value has the type that the schema says, and no list of choices is left.
pub(crate) fn check(schema: &Value, value: &Value, at: &str) -> Result<(), String> {
    let fail = || Err(format!("{at}: {value} is not {schema}"));
    if value.is_null() && schema["nullable"] == true {
        return Ok(());
    }
    if let Some(choices) = schema["enum"].as_array()
        && !choices.contains(value)
    {
        return fail();
    }
    match (schema["type"].as_str(), value) {
        (Some("object"), Value::Object(fields)) => {
            fields.iter().try_for_each(|(name, value)| match schema["properties"].get(name) {
                Some(schema) => check(schema, value, &format!("{at}.{name}")),
                None => Ok(()),
            })
        }
        (Some("array"), Value::Array(items)) => {
            items.iter().try_for_each(|item| check(&schema["items"], item, &format!("{at}[]")))
        }
        (Some("integer"), Value::Number(number)) if !number.is_f64() => Ok(()),
        (Some("string"), Value::String(text)) => {
            let is_number = text.len() <= 20 && !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            if schema.get("pattern").is_some() && !is_number { fail() } else { Ok(()) }
        }
        (Some("boolean"), Value::Bool(_)) => Ok(()),
        _ => fail(),
    }
}

/// Every field that a schema lists, as a path from the root.
pub(crate) fn fields(schema: &Value) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    collect(schema, &mut Vec::new(), &mut found);
    found
}

fn collect(schema: &Value, at: &mut Vec<String>, found: &mut Vec<Vec<String>>) {
    if let Some(items) = schema.get("items") {
        return collect(items, at, found);
    }
    for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
        at.push(name.clone());
        found.push(at.clone());
        collect(schema, at, found);
        at.pop();
    }
}

/// The same schema without one field.
pub(crate) fn without(schema: &Value, path: &[String]) -> Value {
    let mut schema = schema.clone();
    let mut at = &mut schema;
    for (depth, name) in path.iter().enumerate() {
        while at.get("items").is_some() {
            at = &mut at["items"];
        }
        let listed = at["properties"].as_object_mut().unwrap();
        if depth + 1 == path.len() {
            listed.remove(name).unwrap();
            break;
        }
        at = listed.get_mut(name).unwrap();
    }
    schema
}
