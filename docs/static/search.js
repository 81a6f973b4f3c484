// What Sphinx reads for its search (html_search_scorer): the order of the results, and the text of their excerpts.
"use strict";

/* A page or entry that explains a term comes before pages that use it; the name of an object (load_draft, kdcode.serve)
   finds its entry first. */
const isName = query => /[_.]|[a-z][A-Z]/.test(query);

function explains(page, anchor) {
  if (page === "glossary" && anchor) return 70;
  return page === "tutorials/speculative_decoding" ? 50 : page.startsWith("tutorials/") ? 10 : 0;
}

var Scorer = {
  score: ([page, , anchor, , score]) =>
    isName(new URLSearchParams(location.search).get("q") ?? "") ? score : score + explains(page, anchor),
  // Sphinx's defaults
  objNameMatch: 11, objPartialMatch: 6, objPrio: { 0: 15, 1: 5, 2: -5 }, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
};

const LETTERS = { alpha: "α", beta: "β", gamma: "γ", tau: "τ", sum: "Σ", min: "min", max: "max", cdot: "·", le: "≤", ge: "≥", in: "∈", sim: "~", to: "→", approx: "≈" };

const RAISED = { "^0": "⁰", "^1": "¹", "^2": "²", "^3": "³", _0: "₀", _1: "₁", _2: "₂", _t: "ₜ", _x: "ₓ" };

/* An equation as plain text: short ones in letters, others as an ellipsis. */
function plainEquation(tex) {
  const text = tex.replace(/\\[()[\]]/g, "").replace(/\\([a-z]+)\s?/gi, (all, name) => LETTERS[name] ?? all)
    .replace(/[\^_]\w/g, all => RAISED[all] ?? all);
  return /[\\{}&^_]/.test(text) ? "…" : text;
}

/* The prose of a page, or of one of its sections: no equations, code, outputs, tables or navigation. */
function proseOf(html, anchor) {
  const page = new DOMParser().parseFromString(html, "text/html");
  const section = anchor && page.getElementById(decodeURIComponent(anchor.slice(1)));
  const part = section || page.querySelector("article") || page.body;
  if (section) section.querySelector("h2, h3, h4")?.remove();  // the result's title
  const unread = ".headerlink, script, style, summary, h1, pre, table, .cell_output, .page-links, .where, .defines, .toctree-wrapper";
  for (const element of part.querySelectorAll(unread)) element.remove();
  for (const equation of part.querySelectorAll(".math")) equation.replaceWith(plainEquation(equation.textContent));
  return part.textContent.replace(/\s+/g, " ").trim();
}

/* Where the words begin (all of them in turn, or else one of them), only at the start of a word; 0 if they don't occur. */
function placeOf(words, text) {
  const patterns = words.map(_escapeRegExp);
  for (const pattern of [patterns.join("\\p{L}*\\P{L}+"), patterns.join("|")]) {
    const place = text.search(new RegExp(`(?<!\\p{L})(${pattern})`, "iu"));
    if (place >= 0) return place;
  }
  return 0;
}

/* About 240 characters in whole words: the beginning of a section, or the text of a page around the words of a query. */
function excerpt(html, words, anchor) {
  const text = proseOf(html, anchor);
  if (!text) return null;
  const place = anchor ? 0 : placeOf([...words], text);
  const start = place <= 120 ? 0 : text.lastIndexOf(" ", place - 100) + 1;
  const end = start + 240 >= text.length ? text.length : text.lastIndexOf(" ", start + 240);
  const paragraph = document.createElement("p");
  paragraph.className = "context";
  paragraph.textContent = (start ? "… " : "") + text.slice(start, end) + (end < text.length ? " …" : "");
  return paragraph;
}

/* The glossary's entries whose titles have all words, as results of a search. */
function glossaryEntries(words) {
  const { alltitles, docnames, filenames } = Search._index, found = [];
  for (const [title, places] of Object.entries(alltitles)) {
    const parts = splitQuery(title.toLowerCase());
    if (![...words].every(word => parts.some(part => part.startsWith(word)))) continue;
    for (const [file, id] of places)
      if (docnames[file] === "glossary" && id)
        found.push(["glossary", `Glossary > ${title}`, `#${id}`, null, Scorer.term, filenames[file], "title"]);
  }
  return found;
}

if (typeof Search !== "undefined") {  // a page's own script, searchtools.js, comes before this file
  Search.makeSearchSummary = excerpt;
  const pagesWith = Search.performTermsSearch;
  Search.performTermsSearch = (words, excluded) => {
    const entries = glossaryEntries(words);
    return [...entries, ...pagesWith(words, excluded).filter(([page]) => page !== "glossary" || !entries.length)];
  };
}
