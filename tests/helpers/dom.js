// The part of a browser that the program of a report uses. Anything else raises a TypeError, which fails the test.

class TextNode {
  constructor(text) {
    this.textContent = text;
  }
}

class Element {
  constructor(tag) {
    Object.assign(this, { tag, attributes: {}, childNodes: [], listeners: {}, parentNode: null, hidden: false });
    const name = (key) => `data-${key}`;
    this.dataset = new Proxy({}, {
      get: (_, key) => this.attributes[name(key)],
      set: (_, key, value) => ((this.attributes[name(key)] = String(value)), true),
    });
    this.classList = { toggle: (wanted) => this.toggleClass(wanted) };
  }

  get className() { return this.attributes.class ?? ""; }
  set className(value) { this.attributes.class = value; }
  toggleClass(wanted) {
    const own = this.className.split(" ");
    this.className = (own.includes(wanted) ? own.filter((c) => c !== wanted) : [...own, wanted]).join(" ");
  }
  get textContent() { return this.childNodes.map((node) => node.textContent).join(""); }
  set textContent(text) { this.replaceChildren(text); }
  get value() { return this.chosen ?? this.querySelector("option")?.attributes.value ?? ""; }
  set value(value) { this.chosen = value; }
  setAttribute(key, value) { this.attributes[key] = value; }
  append(...nodes) {
    for (const node of nodes.map((n) => (typeof n === "string" ? new TextNode(n) : n))) {
      if (!(node instanceof Element || node instanceof TextNode)) throw new TypeError(`not a node: ${node}`);
      node.parentNode = this;
      this.childNodes.push(node);
    }
  }
  replaceChildren(...nodes) {
    this.childNodes = [];
    this.append(...nodes);
  }
  addEventListener(type, listener) { (this.listeners[type] ??= []).push(listener); }
  dispatch(type) { (this.listeners[type] ?? []).forEach((listener) => listener({ type, target: this })); }
  scrollIntoView() {}

  matches(selector) {
    const [, tag, rest] = /^([a-z0-9]*)(.*)$/.exec(selector);
    const parts = rest.match(/#[\w-]+|\.[\w-]+|\[[\w-]+(=[\w-]+)?\]/g) ?? [];
    if (parts.join("") !== rest) throw new TypeError(`selector is not supported: ${selector}`);
    return (!tag || tag === this.tag) && parts.every((part) => {
      if (part[0] === "#") return this.attributes.id === part.slice(1);
      if (part[0] === ".") return this.className.split(" ").includes(part.slice(1));
      const [key, value] = part.slice(1, -1).split("=");
      return key in this.attributes && (value === undefined || this.attributes[key] === value);
    });
  }
  *descendants() {
    for (const child of this.childNodes.filter((node) => node instanceof Element)) {
      yield child;
      yield* child.descendants();
    }
  }
  querySelectorAll(selector) {
    const [last, ...ancestors] = selector.split(" ").reverse();
    return [...this.descendants()].filter((element) => element.matches(last) && ancestors.every((a) => element.parentNode.closest(a)));
  }
  querySelector(selector) { return this.querySelectorAll(selector)[0] ?? null; }
  closest(selector) { return this.matches(selector) ? this : this.parentNode?.closest(selector) ?? null; }
}

class Option extends Element {
  constructor(text, value) {
    super("option");
    this.append(text);
    this.attributes.value = value;
  }
}

function buildElement([tag, attributes, children]) {
  const element = new Element(tag);
  Object.assign(element.attributes, attributes);
  element.hidden = "hidden" in attributes;
  element.append(...children.map((child) => (typeof child === "string" ? child : buildElement(child))));
  return element;
}

globalThis.window = globalThis;
globalThis.problems = [];
globalThis.console = Object.fromEntries(["log", "warn", "error"].map((kind) => [kind, (...words) => problems.push(words.join(" "))]));
globalThis.documentElement = buildElement(JSON.parse(TREE));
globalThis.document = {
  documentElement,
  createElement: (tag) => new Element(tag),
  getElementById: (id) => documentElement.querySelector(`#${id}`),
  querySelectorAll: (selector) => documentElement.querySelectorAll(selector),
};
globalThis.darkScheme = { matches: false, listeners: [], addEventListener(_, listener) { this.listeners.push(listener); } };
globalThis.matchMedia = (query) => (query.includes("dark") ? darkScheme : { matches: true });
globalThis.getComputedStyle = () => ({ getPropertyValue: () => " #123456 #654321 " });
globalThis.drawings = [];
globalThis.finished = 0;
globalThis.vegaEmbed = async (element, spec, options) => {
  const view = { addEventListener: (type, listener) => (element.pick = listener) };
  drawings.push({ element, spec, options });
  return { view, finalize: () => finished++ };
};
