// A form for an item, from the JSON schema of a model.

import { h, json } from "./dom.js";

const LONG_TEXT = 120;

/** A schema without references, and without the null that an optional field allows. */
function resolved(schema, root) {
  let found = schema ?? {};
  for (let depth = 0; depth < 20; depth += 1) {
    if (found.$ref) found = { ...root.$defs?.[found.$ref.split("/").pop()], ...found, $ref: undefined };
    else if (found.allOf?.length === 1) found = { ...found.allOf[0], ...found, allOf: undefined };
    else if (found.anyOf) {
      const others = found.anyOf.filter((each) => each.type !== "null");
      if (others.length !== 1) break;
      found = { ...found, ...others[0], anyOf: undefined };
    } else break;
  }
  return found;
}

/** A value that a schema may allow, to begin with. */
function madeUp(schema, root, depth = 0) {
  const found = resolved(schema, root);
  if (found.examples?.length) return found.examples[0];
  if (found.default !== undefined) return found.default;
  if (found.const !== undefined) return found.const;
  if (found.enum) return found.enum[0];
  if (found.type === "string") return "";
  if (found.type === "integer" || found.type === "number") return found.minimum ?? 0;
  if (found.type === "boolean") return false;
  if (found.type === "array") return depth > 4 ? [] : [madeUp(found.items, root, depth + 1)];
  if (found.properties) {
    const needed = Object.entries(found.properties).filter(([name]) => depth < 4 && found.required?.includes(name));
    return Object.fromEntries(needed.map(([name, field]) => [name, madeUp(field, root, depth + 1)]));
  }
  const choices = found.oneOf ?? found.anyOf;
  return choices ? madeUp(choices[0], root, depth + 1) : null;
}

let fields = 0;

/** The fields of an item. `item()` is the item as it is filled in; it throws `SyntaxError` for what is no JSON. */
export class ItemForm {
  constructor(schema, changed) {
    this.schema = schema;
    this.changed = changed;
    this.root = h("div", { class: "fields" });
    this.showFields(Object.keys(schema.properties ?? {}).length > 0);
  }

  /** Show a field for each property, or one for the whole item. */
  showFields(isSplit, item = null) {
    const whole = item ?? madeUp(this.schema, this.schema) ?? {};
    this.isSplit = isSplit;
    this.fields = isSplit
      ? Object.entries(this.schema.properties).map(([name, schema]) => this.#field(name, schema, whole[name]))
      : [this.#jsonField("Item", {}, whole, true)];
    this.root.replaceChildren(...this.fields.map((field) => field.element));
    this.root.oninput = () => this.changed();
  }

  item() {
    if (!this.isSplit) return this.fields[0].value();
    const pairs = this.fields.map((field) => [field.name, field.value()]);
    return Object.fromEntries(pairs.filter(([, value]) => value !== undefined));
  }

  #field(name, given, value) {
    const schema = resolved(given, this.schema);
    const isRequired = this.schema.required?.includes(name) ?? false;
    const filled = value ?? (isRequired ? madeUp(given, this.schema) : (schema.default ?? schema.examples?.[0]));
    const found = this.#control(name, schema, filled, isRequired);
    return { name, ...found };
  }

  #control(name, schema, value, isRequired) {
    if (schema.enum) {
      const options = schema.enum.map((each, place) =>
        h("option", { value: place, selected: each === value }, String(each)),
      );
      if (!isRequired) options.unshift(h("option", { value: "" }, "not given"));
      const select = h("select", {}, options);
      return this.#labelled(name, schema, select, isRequired, () =>
        select.value === "" ? undefined : schema.enum[select.value],
      );
    }
    if (schema.type === "boolean") {
      const box = h("input", { type: "checkbox", checked: value === true });
      return this.#labelled(name, schema, box, isRequired, () => box.checked);
    }
    if (schema.type === "integer" || schema.type === "number") {
      const step = schema.type === "integer" ? 1 : "any";
      const input = h("input", { type: "number", step, min: schema.minimum, max: schema.maximum, value });
      return this.#labelled(name, schema, input, isRequired, () =>
        input.value === "" ? undefined : Number(input.value),
      );
    }
    if (schema.type === "string") {
      const isLong = (schema.maxLength ?? Infinity) > LONG_TEXT && !schema.format;
      const input = isLong ? h("textarea", { rows: 3 }) : h("input", { type: "text" });
      input.value = value ?? "";
      return this.#labelled(name, schema, input, isRequired, () =>
        input.value === "" && !isRequired ? undefined : input.value,
      );
    }
    return this.#jsonField(name, schema, value, isRequired);
  }

  #jsonField(name, schema, value, isRequired) {
    const input = h("textarea", { rows: 5, class: "mono", spellcheck: "false" });
    input.value = value === undefined || value === null ? "" : json(value);
    const told = { ...schema, description: [schema.description, "as JSON"].filter(Boolean).join(" · ") };
    return this.#labelled(name, told, input, isRequired, () => {
      if (input.value.trim() === "") return isRequired ? null : undefined;
      try {
        return JSON.parse(input.value);
      } catch (error) {
        throw new SyntaxError(`${name}: ${error.message}`);
      }
    });
  }

  #labelled(name, schema, control, isRequired, value) {
    const id = `field-${++fields}`;
    control.id = id;
    const limits = [
      schema.minLength > 1 && `at least ${schema.minLength} characters`,
      schema.maxLength && `up to ${schema.maxLength.toLocaleString("en")} characters`,
      schema.minimum !== undefined && `from ${schema.minimum}`,
      schema.maximum !== undefined && `to ${schema.maximum}`,
    ].filter(Boolean);
    const hint = [schema.description, limits.join(", ")].filter(Boolean).join(" · ");
    if (hint) control.setAttribute("aria-describedby", `${id}-hint`);
    const element = h(
      "div",
      { class: "field" },
      h("label", { for: id }, name, isRequired ? null : h("span", { class: "optional" }, " optional")),
      control,
      hint && h("p", { class: "caption", id: `${id}-hint` }, hint),
    );
    return { element, value };
  }
}
